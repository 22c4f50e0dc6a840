"""transformers' expert parallelism: `DistributedConfig(ep_size=..., ep_implementation="scatter_moe")`.

transformers shards the experts' weights by its plan and calls the implementation in place of the experts' forward. Ids
of other ranks' experts reach that forward as num_experts, transformers' own sentinel, with weight zero.

T tokens of this rank, M tokens that it receives, K experts per token, D model width.
"""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation

from scatter_moe.distributed.all_to_all import exchange_all_to_all
from scatter_moe.distributed.partition import Partition


class ExchangeEP(EPImplementation):
    """The all-to-all that sends a token once to each rank that has one of its experts.

    Where the ranks of a tensor-parallel group hold the same batch, each takes its share of the tokens first, so that no
    token is computed twice, and the shares are gathered afterwards. Gradients of experts are sums over the ranks, as
    those of transformers' own implementations.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.num_local: int = experts.num_experts
        self.partition = Partition(self.num_local * ep_mesh.size(), ep_mesh.size(), ep_mesh.get_local_rank())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], [T, K] ids among all experts, [T, K] to [T, D]."""
        if self.tp_mesh.size() == 1:
            return self._exchange(hidden_states, top_k_index, top_k_weights)
        y = self._exchange(self._share(hidden_states), self._share(top_k_index), self._share(top_k_weights))
        shape, stride = hidden_states.shape, (hidden_states.shape[1], 1)
        gathered = DTensor.from_local(y, self.tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return gathered.full_tensor()

    def _exchange(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return exchange_all_to_all(self._run, x, topk_ids, topk_weights, self.partition, self.ep_mesh.get_group())

    def _run(self, x_MD: Tensor, topk_ids_MK: Tensor, topk_weights_MK: Tensor) -> Tensor:
        elsewhere = (topk_ids_MK < 0) | (topk_ids_MK >= self.num_local)
        ids = topk_ids_MK.masked_fill(elsewhere, self.num_local)
        weights = topk_weights_MK.masked_fill(elsewhere, 0)
        if len(x_MD) > 0:
            return self.experts_forward(x_MD, ids, weights)
        # Not every implementation of experts takes no rows. A row that is dropped keeps the collectives of backward,
        # for x and for the weights, connected; parameters get exactly zero gradients.
        x_1D, weights_1K = x_MD.sum(0, keepdim=True), weights.sum(0, keepdim=True)
        return self.experts_forward(x_1D, ids.new_zeros(1, ids.shape[1]), weights_1K)[:0]

    def _share(self, tensor: Tensor) -> Tensor:
        """This rank's rows of what the ranks of its tensor-parallel group all hold."""
        replicated = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return replicated.redistribute(self.tp_mesh, [Shard(0)]).to_local()
