"""A ModuleList of experts of any kind, of which each rank keeps its own.

M rows, K experts per token, E experts, D model width.
"""

from typing import cast

import torch
from torch import Tensor, nn

from scatter_moe.dispatch import Dispatch
from scatter_moe.distributed.exchange import Exchange, scaled_gradient


class ExpertList(nn.ModuleList):
    """What a ModuleList becomes. Experts of other ranks are `None`, so that names in checkpoints stay as they were."""

    exchange: Exchange

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`: each token's K experts, weighted and summed."""
        return self.exchange(self._run, x, topk_ids, topk_weights)

    def _run(self, x_MD: Tensor, topk_ids_MK: Tensor, topk_weights_MK: Tensor) -> Tensor:
        """Every local expert is called, with no rows if need be: its gradients are then zeros, and hooks run."""
        dispatch = Dispatch.of_ids(topk_ids_MK, self.exchange.partition.num_local)
        rows = self._scaled(torch.ops.scatter_moe.dispatch(x_MD, *dispatch), self.exchange.num_ranks)
        ends = dispatch.offsets.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        *groups, rest = rows.split([*sizes, len(rows) - ends[-1]])
        local = [expert for expert in self if expert is not None]
        results = [expert(group) for expert, group in zip(local, groups, strict=True)]
        y = self._scaled(torch.cat([*results, rest]), 1 / self.exchange.num_ranks)
        return torch.ops.scatter_moe.combine(y, topk_weights_MK, *dispatch, True)

    def _scaled(self, rows: Tensor, factor: float) -> Tensor:
        """Gradients between the two calls, those of the experts, are divided by the number of ranks."""
        return scaled_gradient(rows, factor) if self.exchange.average else rows


def divide_list(experts: nn.ModuleList, exchange: Exchange) -> None:
    """Make an `ExpertList` of a ModuleList, in place.

    Raises:
        ValueError: for fewer experts than ranks need to have one each; for a second dimension of the mesh.
    """
    if exchange.columns is not None:
        raise ValueError(
            "device_mesh: got a second dimension for a list of experts, accepted is one: what is inside an expert is "
            "parallelized by a plan of its own"
        )
    partition = exchange.partition
    if partition.per_rank * (partition.num_ranks - 1) >= partition.num_experts:
        raise ValueError(
            f"module: got {partition.num_experts} experts for {partition.num_ranks} ranks, accepted are lists of which "
            f"the last rank gets an expert when every rank takes {partition.per_rank}"
        )
    mine = range(partition.first, partition.first + partition.num_local)
    for name in list(experts._modules):
        if int(name) not in mine:
            experts.register_module(name, None)
    experts.__class__ = ExpertList
    cast(ExpertList, experts).exchange = exchange
