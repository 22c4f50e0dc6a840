"""Tensor parallelism inside experts: each rank has some columns of every expert that it holds.

E experts, D model width, F expert width.
"""

from collections.abc import Callable

from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def column_placement(name: str) -> Placement:
    """Of a parameter of `ExpertMLP`: first projections `[E, F, D]` by columns, `down_proj [E, D, F]` by rows."""
    if name == "down_proj":
        return Shard(2)
    return Replicate() if name == "down_proj_bias" else Shard(1)


def on_columns(mesh: DeviceMesh, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of tensors that all ranks of the mesh hold. Its result and their gradients are sums over the ranks.

    What it does with parameters that are sharded over the mesh, DTensor's rules of the operators say.
    """
    replicated = [DTensor.from_local(tensor, mesh, [Replicate()], run_check=False) for tensor in tensors]
    result = function(*replicated)
    assert isinstance(result, DTensor)
    return result.redistribute(placements=[Replicate()]).to_local()


def check_columns(layout: str, d_expert: int, mesh: DeviceMesh) -> None:
    """Raises ValueError where the columns of an expert can't be sharded."""
    if layout == "concatenated":
        raise ValueError(
            f"device_mesh: got a second dimension for experts of layout {layout!r}, accepted are the layouts 'plain', "
            "'interleaved' and 'separate': a rank needs gate and up of the same columns"
        )
    if d_expert % mesh.size():
        raise ValueError(
            f"device_mesh: got {mesh.size()} ranks in the second dimension for experts {d_expert} wide, accepted are "
            "divisors of that"
        )
