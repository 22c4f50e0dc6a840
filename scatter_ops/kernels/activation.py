"""Activations and their derivatives on fp32 tiles, the same formulas as scatter_ops.reference.

Gated:  A = act(gate) * up        plain: A = act(gate), up unused.
clamped_swiglu (gpt-oss): g = min(gate, limit), u = clamp(up, -limit, limit), A = (u + 1) * g * sigmoid(alpha * g).
"""

import triton
import triton.language as tl
from triton import knobs

from scatter_ops.activations import CLAMP_PASSES_AT_ITS_LIMITS

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # which knows no assembly
_PASSES_AT_LIMITS = tl.constexpr(CLAMP_PASSES_AT_ITS_LIMITS)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) in four instructions: the range checks of exp and of a division, three times as many, change
    nothing. exp(-x) beyond the range of fp32 is inf or 0 here too, and its reciprocal plus one is exact.
    """
    if _INTERPRETED:
        result = tl.sigmoid(x)
    else:
        asm: tl.constexpr = """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
        }"""  # 0fBFB8AA3B is -log2(e)
        result = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def _scalar_activation(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g)."""
    if ACTIVATION == "silu":
        s = _sigmoid(g)
        value = g * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        cdf = _sigmoid(2.0 * inner)
        value = g * cdf
        slope = cdf + g * 2.0 * cdf * (1.0 - cdf) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    elif ACTIVATION == "relu":
        value = tl.where(g < 0.0, 0.0, g)
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        value = tl.where(g < 0.0, 0.0, g * g)
        slope = tl.where(g <= 0.0, 0.0, 2.0 * g)
    return value, slope


@triton.jit
def _stops(x, limit):
    """Whether a clamp of x to at most this limit passes no gradient."""
    if _PASSES_AT_LIMITS:
        result = x > limit
    else:
        result = x >= limit
    return result


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    if ACTIVATION == "clamped_swiglu":
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        result = (u + 1.0) * g * _sigmoid(alpha * g)
    else:
        result, _ = _scalar_activation(gate, ACTIVATION)
        if GATED:
            result *= up
    return result


@triton.jit
def activate_backward(gate, up, grad, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """A, dA/dgate * grad, dA/dup * grad (meaningless if not GATED)."""
    if ACTIVATION == "clamped_swiglu":
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        s = _sigmoid(alpha * g)
        result = (u + 1.0) * g * s
        grad_gate = tl.where(_stops(gate, limit), 0.0, grad * (u + 1.0) * s * (1.0 + alpha * g * (1.0 - s)))
        grad_up = tl.where(_stops(up, limit) | _stops(-up, limit), 0.0, grad * g * s)
    else:
        value, slope = _scalar_activation(gate, ACTIVATION)
        if GATED:
            result = value * up
            grad_gate = grad * up * slope
            grad_up = grad * value
        else:
            result = value
            grad_gate = grad * slope
            grad_up = grad
    return result, grad_gate, grad_up
