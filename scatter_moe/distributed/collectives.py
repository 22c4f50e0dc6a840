"""The functional collectives of torch.distributed that all-gather is made of: differentiable and traceable.

Backward of all-gather is reduce-scatter, of reduce-scatter all-gather: gradients are sums over the ranks' losses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

_FUNCTIONAL = torch.ops._c10d_functional


def all_gather(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The rows of all ranks, in the ranks' order. Each rank gives equally many.

    The transfers start in the order of the tensors, and each is waited for where its rows are first read.
    """
    name, size = group.group_name, group.size()
    started = [_FUNCTIONAL.all_gather_into_tensor(tensor.contiguous(), size, name) for tensor in tensors]
    return [functional._maybe_wrap_tensor(tensor) for tensor in started]


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, of which each rank gets its share of the rows."""
    started = _FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return _ContiguousGradient.apply(_FUNCTIONAL.wait_tensor(started))


class _ContiguousGradient(torch.autograd.Function):
    """x, whose gradient is sent on contiguous, as NCCL and gloo want it: that of a sum is one expanded number."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return grad.contiguous()
