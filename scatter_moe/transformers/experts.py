"""The forward that transformers' experts modules call: `fn(self, hidden_states, top_k_index, top_k_weights)`.

An expert is up projection -> gate -> down projection (-> norm). Where the gate is one that the fused operator knows,
found by what it computes (`fx_passes.gate`), the whole layer is one operator; any other gate and any norm run in
PyTorch on the grouped rows, between two grouped GEMMs.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H = 2F (F without a gate).
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from fx_passes.gate import Gate, inputs_of, inputs_of_function, recognise
from scatter_moe.dispatch import Dispatch


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers module on this library's operators.

    Args:
        self: a module of a class decorated with `@use_experts_implementation`: `gate_up_proj [E, H, D]` (`up_proj`
            without a gate) and `down_proj [E, D, F]`, both with their last two dims swapped if `is_transposed`, each
            with a `_bias` if `has_bias`. Attributes that an older transformers doesn't set have its behaviour.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]`. An id of E or more is a sentinel of expert parallelism: its slot is not computed.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, D]` in the dtype of hidden_states.

    Raises:
        TypeError, ValueError: where shapes or dtypes don't fit, naming the argument of the operator.
    """
    up = self.gate_up_proj if getattr(self, "has_gate", True) else self.up_proj
    dispatch = Dispatch.of_ids(top_k_index, up.shape[0])
    gate = gate_of(self)
    if gate is None:
        return _general(self, hidden_states, top_k_weights, dispatch)
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
    (up, up_bias), (down, down_bias) = _projections(self)
    return torch.ops.scatter_moe.mlp(
        x_TD,
        topk_weights,
        dispatch.order,
        dispatch.offsets,
        up,
        [],
        down,
        up_bias,
        [],
        down_bias,
        gate.activation,
        gate.layout,
        getattr(self, "is_transposed", False),
        "output",
        gate.alpha,
        gate.limit,
        x_TD.dtype,
    )


def _general(self: Any, x_TD: Tensor, topk_weights: Tensor, dispatch: Dispatch) -> Tensor:
    (up, up_bias), (down, down_bias) = _projections(self)
    order, offsets, top_k = dispatch
    transposed = getattr(self, "is_transposed", False)
    linear = torch.ops.scatter_moe.parallel_linear
    h_NH = linear(x_TD, up, order, offsets, top_k, False, True, up_bias, transposed)
    a_NF = self._apply_gate(h_NH) if getattr(self, "has_gate", True) else _activate(self, h_NH)
    y_ND = linear(a_NF, down, order, offsets, 1, True, True, down_bias, transposed)
    if getattr(self, "has_post_expert_norm", False):
        y_ND = self.post_expert_norm(y_ND)
    return torch.ops.scatter_moe.combine(y_ND, topk_weights, order, offsets, top_k, True, x_TD.dtype)


def _projections(self: Any) -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """Weight and bias of the up and of the down projection, as the operators take them."""
    name = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    has_bias = getattr(self, "has_bias", False)
    up_bias = [getattr(self, f"{name}_bias")] if has_bias else []
    return ([getattr(self, name)], up_bias), ([self.down_proj], [self.down_proj_bias] if has_bias else [])
