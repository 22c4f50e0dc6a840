"""The forward that transformers' experts modules call: `fn(self, hidden_states, top_k_index, top_k_weights)`.

An expert is up projection -> gate -> down projection (-> norm). Where the gate is one that the fused operator knows,
found by what it computes (`fx_passes.modules.gate`), the whole layer is one operator; any other gate and any norm run
in PyTorch on the grouped rows, between two grouped GEMMs.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H = 2F (F without a gate).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fx_passes.modules.gate import Gate, inputs_of, inputs_of_function, recognise
from scatter_moe.dispatch import Dispatch
from scatter_moe.peft import LowRank, joined

Adapters = Mapping[str, list[LowRank]]


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Adapters | None = None
) -> Tensor:
    """The experts of a transformers module on this library's operators.

    Args:
        self: a module of a class decorated with `@use_experts_implementation`: `gate_up_proj [E, H, D]` (`up_proj`
            without a gate) and `down_proj [E, D, F]`, both with their last two dims swapped if `is_transposed`, each
            with a `_bias` if `has_bias`. Attributes that an older transformers doesn't set have its behaviour.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]`. An id of E or more is a sentinel of expert parallelism: its slot is not computed.
        top_k_weights: `[T, K]`.
        adapters: by name of a parameter what is added to it, which is never made as a whole.

    Returns:
        `[T, D]` in the dtype of hidden_states.

    Raises:
        TypeError, ValueError: where shapes or dtypes don't fit, naming the argument of the operator.
    """
    up = self.gate_up_proj if getattr(self, "has_gate", True) else self.up_proj
    dispatch = Dispatch.of_ids(top_k_index, up.shape[0])
    gate = None if adapters else gate_of(self)
    if gate is None:
        return _general(self, hidden_states, top_k_weights, dispatch, adapters or {})
    return _fused(self, hidden_states, top_k_weights, dispatch, gate)


def gate_of(self: Any) -> Gate | None:
    """What stands between the two products, if the fused operator has it and nothing follows the second."""
    if getattr(self, "has_post_expert_norm", False):
        return None
    if getattr(self, "has_gate", True):
        weight, inputs = self.gate_up_proj, inputs_of(self, "_apply_gate")
    else:
        weight, inputs = self.up_proj, inputs_of_function(self, _activate)
    return recognise(inputs, weight.shape[2 if getattr(self, "is_transposed", False) else 1], weight.dtype)


def fp8_experts_forward(self: Any, *args: Tensor, **kwargs: Tensor) -> NoReturn:
    """transformers looks FP8 experts up in a registry of its own: what it finds there says what to do."""
    raise NotImplementedError(
        f"{type(self).__name__}: experts_implementation='scatter_moe' takes float16, bfloat16 and float32 experts, not "
        "FP8. Load the model with FineGrainedFP8Config(dequantize=True), or choose 'grouped_mm'."
    )


def _activate(self: Any, h_NH: Tensor) -> Tensor:
    """What stands in the place of `_apply_gate` in experts without a gate."""
    return self.act_fn(h_NH)


def _fused(self: Any, x_TD: Tensor, topk_weights: Tensor, dispatch: Dispatch, gate: Gate) -> Tensor:
    up, down = _projections(self, {})
    return torch.ops.scatter_moe.mlp(
        x_TD,
        topk_weights,
        dispatch.order,
        dispatch.offsets,
        [up.weight],
        [],
        [down.weight],
        up.bias,
        [],
        down.bias,
        gate.activation,
        gate.layout,
        up.transposed,
        "output",
        gate.alpha,
        gate.limit,
        x_TD.dtype,
    )


def _general(self: Any, x_TD: Tensor, topk_weights: Tensor, dispatch: Dispatch, adapters: Adapters) -> Tensor:
    up, down = _projections(self, adapters)
    order, offsets, top_k = dispatch
    h_NH = _project(up, x_TD, dispatch, rows_are_grouped=False)
    a_NF = self._apply_gate(h_NH) if getattr(self, "has_gate", True) else _activate(self, h_NH)
    y_ND = _project(down, a_NF, dispatch, rows_are_grouped=True)
    if getattr(self, "has_post_expert_norm", False):
        y_ND = self.post_expert_norm(y_ND)
    return torch.ops.scatter_moe.combine(y_ND, topk_weights, order, offsets, top_k, True, x_TD.dtype)


class _Projection(NamedTuple):
    weight: Tensor
    bias: list[Tensor]
    adapters: list[LowRank]
    transposed: bool


def _projections(self: Any, adapters: Adapters) -> tuple[_Projection, _Projection]:
    """The up and the down projection."""
    has_bias, transposed = getattr(self, "has_bias", False), getattr(self, "is_transposed", False)

    def projection(name: str) -> _Projection:
        bias = [getattr(self, f"{name}_bias")] if has_bias else []
        return _Projection(getattr(self, name), bias, adapters.get(name, []), transposed)

    return projection("gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"), projection("down_proj")


def _project(projection: _Projection, rows: Tensor, dispatch: Dispatch, *, rows_are_grouped: bool) -> Tensor:
    """The product of rows `[T, in]`, or of `[N, in]` that are grouped, with each slot's expert: grouped `[N, out]`."""
    weight, bias, adapters, transposed = projection
    order, offsets, top_k = dispatch
    layout = (1 if rows_are_grouped else top_k, rows_are_grouped, True)
    if not adapters:
        return torch.ops.scatter_moe.parallel_linear(rows, [weight], order, offsets, *layout, bias, transposed)
    lhs, rhs, scale = joined(adapters)
    factors = lhs.to(weight.dtype), rhs.to(weight.dtype)
    options = (scale, *layout, bias, transposed)
    return torch.ops.scatter_moe.adapted_linear(rows, weight, *factors, order, offsets, *options)
