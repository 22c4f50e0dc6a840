"""`ExpertParallel`: the experts of a layer divided among the ranks of a mesh dimension.

T tokens, K experts per token, E experts, D model width, R ranks.
"""

from typing import Literal, get_args

from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from scatter_moe.distributed.columns import check_columns, column_placement
from scatter_moe.distributed.exchange import Exchange
from scatter_moe.distributed.expert_list import divide_list
from scatter_moe.distributed.partition import Partition
from scatter_moe.expert_mlp import ExpertMLP
from scatter_moe.moe import MoE

Kind = Literal["auto", "all_to_all", "all_gather"]


class ExpertParallel(ParallelStyle):
    """A style for `torch.distributed.tensor.parallel.parallelize_module`: each rank holds ceil(E / R) experts.

        mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("ep",))
        parallelize_module(model, mesh["ep"], {"layers.*.moe": scatter_moe.ExpertParallel()})

    Each rank calls the layer with its own tokens. A second dimension of the mesh, `mesh["ep", "tp"]`, divides the
    columns of each expert (tensor parallelism), and its ranks call the layer with the same tokens. For `MoE` and
    `ExpertMLP` the parameters become DTensors that are sharded by experts and columns; E need not be a multiple of R.
    Of an `nn.ModuleList` of experts (`[M, D]` to `[M, D]`) each rank keeps its own and the list becomes callable as
    `experts(x, topk_ids, topk_weights)`, as `MoE` calls it.

    | exchange | sends | host synchronisations | T |
    |---|---|---|---|
    | "all_to_all" | a token once to each rank that has one of its experts | one | may differ by rank |
    | "all_gather" | every token to every rank | none: one graph, CUDA graphs | the same on all ranks, or max_tokens |

    "auto" takes "all_gather" if max_tokens is given and either torch.compile traces the layer or all-to-all would send
    hardly less, else "all_to_all".

    Args:
        exchange: one of the table.
        max_tokens: an upper bound of T, the same on every rank, which "all_gather" pads to.
        gradients: "mean" divides the experts' gradients by R, so that they are means over the ranks' losses as those of
            dense parameters under DDP and FSDP are. "sum" leaves that to the caller.

    Raises:
        ValueError: for other values; for a mesh of more than two dimensions, or of two without names; for a second
            dimension where the experts are a list, of layout "concatenated" or of a width that it doesn't divide; for a
            list of fewer experts than ranks.
        TypeError: for a module that is none of these.
    """

    def __init__(
        self, exchange: Kind = "auto", *, max_tokens: int | None = None, gradients: Literal["mean", "sum"] = "mean"
    ) -> None:
        super().__init__()
        if exchange not in get_args(Kind):
            raise ValueError(f"exchange: got {exchange!r}, accepted are {', '.join(map(repr, get_args(Kind)))}")
        if gradients not in ("mean", "sum"):
            raise ValueError(f"gradients: got {gradients!r}, accepted are 'mean' and 'sum'")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, accepted are None and numbers from 1")
        self.exchange: Kind = exchange
        self.max_tokens, self.gradients = max_tokens, gradients

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, MoE):
            self._apply(module.experts, device_mesh)
        elif isinstance(module, nn.ModuleList):
            divide_list(module, self._exchange(len(module), device_mesh))
        elif isinstance(module, ExpertMLP):
            self._divide(module, device_mesh)
        else:
            raise TypeError(
                f"module: got {type(module).__name__}, accepted are MoE, ExpertMLP and a ModuleList of experts"
            )
        return module

    def _divide(self, module: ExpertMLP, mesh: DeviceMesh) -> None:
        exchange = self._exchange(module.num_experts, mesh)
        columns = exchange.columns
        if columns is not None:
            check_columns(module.layout, module.d_expert, columns)
        module.exchange = exchange
        for name, parameter in list(module.named_parameters(recurse=False)):
            placements = [Shard(0)] if columns is None else [Shard(0), column_placement(name)]
            sharded = distribute_tensor(parameter, mesh, placements, src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def _exchange(self, num_experts: int, mesh: DeviceMesh) -> Exchange:
        names = mesh.mesh_dim_names
        if mesh.ndim > 2 or (mesh.ndim == 2 and names is None):
            raise ValueError(
                f"device_mesh: got {mesh.ndim} dimensions named {names}, accepted are one, and two that are named: "
                "take them from the mesh by their names"
            )
        columns = None
        if mesh.ndim == 2:
            assert names is not None
            mesh, columns = mesh[names[0]], mesh[names[1]]
        partition = Partition(num_experts, mesh.size(), mesh.get_local_rank())
        return Exchange(mesh, partition, self.exchange, self.max_tokens, self.gradients == "mean", columns)
