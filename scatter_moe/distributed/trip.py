"""`Trip`: rows of tokens to the ranks that need them, and one row a token and rank back.

    out     a token's row to each of its ranks
    back    the sum of the rows that came back, accumulated in fp32

Each is the other's adjoint: backward of the one is the other.

T tokens of this rank, S ranks that a token goes to at most, M rows that this rank receives, R ranks.
"""

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_OPS = torch.ops.scatter_moe


class Trip:
    """Which rows go to which rank.

    Args:
        ranks_TS: `[T, S]`, a token's ranks; R where there are fewer than S.
        group: the R ranks; all must make the trip.
    """

    def __init__(self, ranks_TS: Tensor, group: ProcessGroup) -> None:
        self.group, self.width = group, ranks_TS.shape[1]
        self.order, self.offsets = _OPS.route(ranks_TS, group.size())
        sent_R = self.offsets.diff(prepend=self.offsets.new_zeros(1))
        received_R = torch.empty_like(sent_R)
        dist.all_to_all_single(received_R, sent_R, group=group)
        self._sizes = torch.stack((sent_R, received_R)).to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if sent_R.is_cuda else None

    @cached_property
    def sizes(self) -> tuple[list[int], list[int]]:
        """How many rows go to each rank, and how many come from each. The only wait of the host for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        sent, received = self._sizes.tolist()
        return sent, received

    def out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Of each tensor, integers too, the rows that the ranks sent here: `[T, D]` to `[M, D]`."""
        return _Out.apply(self, *tensors)

    def back(self, rows_MD: Tensor) -> Tensor:
        """`[M, D]` to `[T, D]`."""
        return _Back.apply(self, rows_MD)

    def send(self, *tensors: Tensor) -> list[Tensor]:
        """`out` without gradients. Rows are copied before the sizes are waited for, so that the device has work."""
        copies = [self._rows_of_slots(tensor) for tensor in tensors]
        sent, received = self.sizes
        started = [
            self._start(rows[: sum(sent)], rows.new_empty(sum(received), rows.shape[1]), received, sent)
            for rows in copies
        ]
        return [_finished(*transfer) for transfer in started]

    def collect(self, *tensors: Tensor) -> list[Tensor]:
        """`back` without gradients. Rows past those that arrive belong to no token: nobody reads them."""
        sent, received = self.sizes
        slots = [rows.new_empty(self.order.numel(), rows.shape[1]) for rows in tensors]
        started = [
            self._start(rows.contiguous(), into[: sum(sent)], sent, received)
            for rows, into in zip(tensors, slots, strict=True)
        ]
        for transfer in started:
            _finished(*transfer)
        return [_OPS.combine(rows, None, self.order, self.offsets, self.width, True) for rows in slots]

    def _rows_of_slots(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return _OPS.dispatch(tensor, self.order, self.offsets, self.width)
        return tensor[self.order // self.width]

    def _start(self, rows: Tensor, into: Tensor, received: list[int], sent: list[int]) -> tuple[Tensor, dist.Work]:
        work = dist.all_to_all_single(into, rows, received, sent, group=self.group, async_op=True)
        assert work is not None
        return into, work


def _finished(tensor: Tensor, work: dist.Work) -> Tensor:
    work.wait()
    return tensor


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip: Trip, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        received = trip.send(*tensors)
        ctx.mark_non_differentiable(*[rows for rows in received if not rows.is_floating_point()])
        return tuple(received)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, *needs = ctx.needs_input_grad
        collected = iter(ctx.trip.collect(*[grad for grad, need in zip(grads, needs, strict=True) if need]))
        return None, *[next(collected) if need else None for need in needs]


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip: Trip, rows_MD: Tensor) -> Tensor:
        ctx.trip = trip
        return trip.collect(rows_MD)[0]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.trip.send(*grads)[0]
