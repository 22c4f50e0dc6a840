"""What the forward of one expert, a module of its own, computes: is it a (gated) MLP of its parameters?"""

import copy
import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fx_passes.body.linear_body import Linear
from fx_passes.body.mlp_body import match_mlp
from fx_passes.body.values import Body, Gathered, PerExpert
from fx_passes.modules.gate import has_hooks
from fx_passes.modules.recorder import Recorder

_log = logging.getLogger("scatter_moe")
_ROWS = 3


class Projection(NamedTuple):
    """The names of a linear layer's parameters, and what they are."""

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class ExpertModule(NamedTuple):
    """An MLP as the operator `mlp` takes it."""

    gate_up: Projection
    up: Projection | None
    down: Projection
    activation: str
    layout: str
    transposed: bool
    alpha: float
    limit: float


def recognise_expert(expert: nn.Module) -> ExpertModule | None:
    """The MLP that `expert(x)` is for rows x, or None. Runs its forward once, on a copy without data."""
    plain = all(type(parameter) is nn.Parameter for parameter in expert.parameters())
    widths = {parameter.shape[-1] for parameter in expert.parameters() if parameter.dim() == 2}
    if not plain or any(has_hooks(module) for module in expert.modules()):
        return None
    return next((found for width in sorted(widths) if (found := _run(expert, width)) is not None), None)


def _run(expert: nn.Module, width: int) -> ExpertModule | None:
    """On rows of this width, which isn't known: most widths fail at the first product."""
    recorder = Recorder()
    data = [*expert.parameters(), *expert.buffers()]
    without_data = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in data}
    twin = copy.deepcopy(expert, dict(without_data))
    names = {}
    for name, parameter in expert.named_parameters():
        node = recorder.node(name.replace(".", "_"), without_data[id(parameter)])
        recorder.note(without_data[id(parameter)], PerExpert(node, tensors=(node,)))
        names[node] = name
    x = torch.empty(_ROWS, width, device="meta", dtype=next(expert.parameters()).dtype)
    x_node = recorder.node("x", x)
    recorder.note(x, Gathered(x_node, x_node))
    try:
        with recorder:
            out = twin(x)
    except Exception as error:  # noqa: BLE001  anyone's code runs here, on rows of a width that was guessed
        _log.debug("%s is not recognised with rows of %d: %s", type(expert).__name__, width, error)
        return None
    root = recorder.value_of(out)
    mlp = match_mlp(Body(root, (), frozenset())) if root is not None and not recorder.wrote else None
    if mlp is None or mlp.weights is not None:
        return None

    def projection(linear: Linear) -> Projection:
        parameter: Tensor = linear.weight.node.meta["example_value"]
        bias = None if linear.bias is None else names[linear.bias.node]
        return Projection(names[linear.weight.node], bias, tuple(parameter.shape), parameter.dtype)

    up = None if mlp.up is None else projection(mlp.up)
    first, down, transposed = projection(mlp.gate_up), projection(mlp.down), mlp.down.transposed
    return ExpertModule(first, up, down, mlp.activation, mlp.layout, transposed, mlp.alpha, mlp.limit)
