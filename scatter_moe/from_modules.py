"""`from_modules`: the experts that a model has already, one module each, run by the fused operator.

T tokens, K experts per token, E experts, D model width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fx_passes.modules.expert_module import ExpertModule, Projection, recognise_expert
from scatter_moe.dispatch import Dispatch


class ExpertList(nn.ModuleList):
    """A `nn.ModuleList` of expert MLPs with a forward; made by `from_modules`."""

    def __init__(self, experts: Iterable[nn.Module], form: ExpertModule) -> None:
        super().__init__(experts)
        self._form = form

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sends each token through its K experts and adds up what they give.

        Args:
            x: `[T, D]`, of the parameters' dtype.
            topk_ids: int32 or int64 `[T, K]`. An id outside 0..E-1 contributes nothing.
            topk_weights: `[T, K]`, any floating-point dtype.

        Returns:
            `[T, D]` in x's dtype, accumulated over K in fp32.

        Raises:
            TypeError, ValueError: naming the argument that isn't as above.
        """
        form, dispatch = self._form, Dispatch.of_ids(topk_ids, len(self))
        gate_up, up, down = (self._parameters_of(p) for p in (form.gate_up, form.up, form.down))
        return torch.ops.scatter_moe.mlp(
            x,
            topk_weights,
            dispatch.order,
            dispatch.offsets,
            gate_up[0],
            up[0],
            down[0],
            gate_up[1],
            up[1],
            down[1],
            form.activation,
            form.layout,
            form.transposed,
            "output",
            form.alpha,
            form.limit,
        )

    def _parameters_of(self, projection: Projection | None) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of all experts, looked up anew, since a user may replace them."""
        if projection is None:
            return [], []
        weights = [_look_up(expert, projection.weight) for expert in self]
        return weights, [] if projection.bias is None else [_look_up(expert, projection.bias) for expert in self]


def from_modules(experts: Iterable[nn.Module]) -> ExpertList:
    """The experts of a model as one module that runs them in one operator, whatever their class.

        self.experts = scatter_moe.from_modules(self.experts)
        ...
        y = self.experts(x, topk_ids, topk_weights)

    Modules and parameters stay what they are, and so do their names in the state dict. Nothing is stacked or copied.
    What the experts compute is read once, here: after a change of their code or settings, call this again.

    Args:
        experts: E modules, each a (gated) MLP: `down(act(gate(x)) * up(x))`, `down(act(up(x)))`, or with gate and up as
            halves of one layer; with or without biases. All alike but for the parameters' values.

    Raises:
        TypeError: `experts` holds no modules.
        ValueError: for an expert that isn't such an MLP, that differs from the first one or that has hooks.
    """
    if not isinstance(experts, Iterable):
        raise TypeError(
            f"experts: got {type(experts).__name__}, accepted is a ModuleList or another iterable of modules"
        )
    experts = list(experts)
    if not experts:
        raise ValueError("experts: got none, accepted is at least one")
    forms = [_form(e, expert) for e, expert in enumerate(experts)]
    for e, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(f"experts[{e}]: got {form}, accepted is what experts[0] is: {forms[0]}")
    return ExpertList(experts, forms[0])


def _form(e: int, expert: nn.Module) -> ExpertModule:
    form = recognise_expert(expert)
    if form is None:
        raise ValueError(
            f"experts[{e}]: got {type(expert).__name__}, accepted is a (gated) MLP without hooks. Other experts can be "
            'written with ParallelLinear, or left as they are for torch.compile(model, backend="scatter_moe")'
        )
    return form


def _look_up(module: nn.Module, name: str) -> Tensor:
    value = module
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value
