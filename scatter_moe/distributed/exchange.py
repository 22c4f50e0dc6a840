"""`Exchange`: what a module whose experts are divided among ranks does with tokens and weights.

T tokens, K experts per token, E experts, D model width, R ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from scatter_moe.distributed.all_gather import exchange_all_gather
from scatter_moe.distributed.all_to_all import Experts, exchange_all_to_all
from scatter_moe.distributed.partition import Partition

EXCHANGES = ("auto", "all_to_all", "all_gather")
# All-gather sends every token to every rank; "auto" takes it where that is at most so many rows a token more than
# all-to-all sends. Two GPUs differ by half a row at most, and all-gather was faster there
# (benchmarks/results/exchange_crossover.jsonl); nobody has measured more.
WORTH_GATHERING = 0.5


@dataclass(frozen=True)
class Exchange:
    """Sends tokens to the ranks of their experts and brings the results back.

    Attributes:
        mesh: one dimension, the ranks among which the experts are divided.
        partition: who has which expert.
        kind: "auto", "all_to_all" or "all_gather".
        max_tokens: an upper bound of T that is the same on every rank, or None.
        average: whether gradients of the experts are divided by R.
        columns: one dimension, the ranks among which the columns of each expert are divided, or None. They hold the
            same tokens.
    """

    mesh: DeviceMesh
    partition: Partition
    kind: Literal["auto", "all_to_all", "all_gather"] = "auto"
    max_tokens: int | None = None
    average: bool = True
    columns: DeviceMesh | None = None

    def __call__(self, experts: Experts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """`experts(x, ids, weights)` runs this rank's experts. [T, D] in, [T, D] out."""
        if isinstance(x, DTensor):
            raise TypeError("x: got a DTensor, accepted are this rank's own tokens as a torch.Tensor (x.to_local())")
        if self.num_ranks == 1:
            return experts(x, topk_ids, topk_weights)
        group = self.mesh.get_group()
        arguments = (experts, x, topk_ids, topk_weights, self.partition, group)
        if self._gathers(topk_ids.shape[1]):
            return exchange_all_gather(*arguments, self.max_tokens)
        return exchange_all_to_all(*arguments)

    def _gathers(self, top_k: int) -> bool:
        """Decided by what is the same on every rank: a rank that decides otherwise would wait forever."""
        if self.kind != "auto":
            return self.kind == "all_gather"
        if self.max_tokens is None:
            return False
        more_rows = (self.num_ranks - 1) * (1 - share_of_ranks(self.num_ranks, top_k))
        return torch.compiler.is_compiling() or more_rows <= WORTH_GATHERING

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's experts of a parameter that is divided among the ranks; a DTensor if their columns are, too."""
        if self.columns is None:
            return self._averaged(local_experts(parameter))
        assert isinstance(parameter, DTensor)
        _, placement = parameter.placements
        tensor = self._averaged(parameter.to_local())
        return DTensor.from_local(tensor, self.columns, [placement], run_check=False)

    def _averaged(self, tensor: Tensor) -> Tensor:
        return scaled_gradient(tensor, 1 / self.num_ranks) if self.average and self.num_ranks > 1 else tensor

    @property
    def num_ranks(self) -> int:
        return self.partition.num_ranks


def share_of_ranks(num_ranks: int, top_k: int) -> float:
    """The share of the ranks that a token goes to if its experts are drawn evenly: `1 - (1 - 1 / R) ** K`."""
    return 1 - (1 - 1 / num_ranks) ** top_k


def local_experts(parameter: Tensor) -> Tensor:
    """This rank's part of a DTensor that is sharded by experts; a plain tensor as it is.

    Raises:
        ValueError: for any other sharding.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if any(placement != Shard(0) for placement in parameter.placements):
        raise ValueError(
            f"parameters: got DTensors with placements {parameter.placements}, accepted are plain tensors and DTensors "
            "that are sharded by experts, [Shard(0)]. ExpertParallel on a mesh of two dimensions shards columns, too"
        )
    return parameter.to_local()


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by factor on its way back."""
    return _ScaledGradient.apply(x, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad * ctx.factor, None


def zeros_of(x: Tensor, *tensors: Tensor) -> Tensor:
    """Zeros like x, from which every tensor gets an exactly zero gradient: for a rank without experts."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (x, *tensors)]
    return torch.zeros_like(x) + sum(part[:0].sum() for part in parts)
