"""Gradient clipping where parameters live on different meshes.

`torch.nn.utils.clip_grad_norm_` stacks the norms of all parameters, which DTensors of different meshes refuse. Here
each mesh gives one norm, and these are added up.
"""

from collections.abc import Iterable
from math import inf

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scatter_moe.distributed.expert_list import ExpertList

# Where parameters are: the mesh of their DTensors, and the mesh among whose ranks a list of experts is divided.
_Place = tuple[DeviceMesh | None, DeviceMesh | None]


@torch.no_grad()
def clip_grad_norm_(
    module: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales the gradients of a model on any meshes so that their norm, taken over all ranks, is at most max_norm.

    All ranks must call it. It takes the module and not its parameters, since a parameter of a divided list of experts
    doesn't say so itself.

    Args:
        module: the model; its parameters are plain tensors or DTensors of any meshes (EP, FSDP2, TP, EP x FSDP2).
        max_norm, norm_type, error_if_nonfinite, foreach: as for `torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm before clipping, a scalar tensor, the same on every rank.

    Raises:
        RuntimeError: if error_if_nonfinite and the norm is nan or inf.
    """
    places = _by_place(module)
    norms = [_norm(parameters, norm_type, place, foreach) for place, parameters in places.items()]
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for parameters in places.values():
        clip_grads_with_norm_(parameters, max_norm, total, foreach)
    return total


def _by_place(module: nn.Module) -> dict[_Place, list[nn.Parameter]]:
    """Parameters that are trained. Not those that have a gradient: every rank must go through the same places."""
    divided = {
        parameter: experts.exchange.mesh
        for experts in module.modules()
        if isinstance(experts, ExpertList)
        for parameter in experts.parameters()
    }
    places: dict[_Place, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            places.setdefault((mesh, divided.get(parameter)), []).append(parameter)
    return places


def _norm(parameters: Iterable[nn.Parameter], norm_type: float, place: _Place, foreach: bool | None) -> Tensor:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(grads, norm_type, False, foreach)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    _, divided = place
    if divided is None:
        return norm
    if norm_type == inf:
        torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.MAX, divided.get_group())
        return norm
    power = norm**norm_type
    torch.distributed.all_reduce(power, group=divided.get_group())
    return power ** (1 / norm_type)
