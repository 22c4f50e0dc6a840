"""A layer of experts on the GPU for tests of its kernels, and a step of it.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scatter_ops import cuda

NEEDS = [True, True, True, False, True, False, False, False]


class Layer(NamedTuple):
    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_up: list[Tensor]
    down: list[Tensor]
    grad_out: Tensor


def layer(T=640, K=2, E=8, D=256, F=192, dtype=torch.bfloat16, listed=False, seed=0) -> Layer:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype, generator=generator) * scale

    def weights(num_out: int, num_in: int) -> list[Tensor]:
        stacked = normal(E, num_out, num_in, scale=num_in**-0.5)
        return [w.clone() for w in stacked] if listed else [stacked]

    scores = torch.rand(T, E, device="cuda", generator=generator)
    topk_weights, topk_ids = scores.topk(K)
    return Layer(normal(T, D), topk_weights, topk_ids, weights(2 * F, D), weights(D, F), normal(T, D))


def step(inputs: Layer, implementation=cuda) -> tuple[Tensor, ...]:
    routing = implementation.route(inputs.topk_ids, inputs_experts(inputs))
    options = ("silu", "concatenated", False, "output", 1.702, 7.0, None)
    arguments = (inputs.x, inputs.topk_weights, *routing, inputs.gate_up, [], inputs.down, [], [], [], *options)
    out, h, _ = implementation.mlp_forward(*arguments, True, False)
    grads = implementation.mlp_backward(inputs.grad_out, h, None, *arguments, NEEDS)
    return out, *(grad for grad in grads if grad.numel())


def inputs_experts(inputs: Layer) -> int:
    return inputs.down[0].shape[0] if len(inputs.down) == 1 else len(inputs.down)


def as_double(inputs: Layer) -> Layer:
    return Layer(
        *(
            [w.double() for w in v] if isinstance(v, list) else v.double() if v.is_floating_point() else v
            for v in inputs
        )
    )


def in_layout(inputs: Layer, layout: str, transposed: bool) -> list[list[Tensor]]:
    """Stacks of gate_up, up and down."""

    def oriented(weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).contiguous() if transposed else weight

    (gate_up,), (down,) = inputs.gate_up, inputs.down
    halves = gate_up.chunk(2, dim=1)
    gate, up = oriented(torch.stack(halves))
    first = {"plain": gate, "separate": gate, "interleaved": oriented(torch.stack(halves, 2).flatten(1, 2))}
    return [[first.get(layout, oriented(gate_up))], [up] if layout == "separate" else [], [oriented(down)]]


def step_in_layout(
    inputs: Layer, weights: list[list[Tensor]], layout: str, transposed: bool, implementation
) -> dict[str, Tensor]:
    """Output and gradients with gate_up, up and down in that layout."""
    routing = implementation.route(inputs.topk_ids, inputs_experts(inputs))
    options = ("silu", layout, transposed, "output", 1.702, 7.0, None)
    arguments = (inputs.x, inputs.topk_weights, *routing, *weights, [], [], [], *options)
    out, h, _ = implementation.mlp_forward(*arguments, True, False)
    needs = [True, True, True, layout == "separate", True, False, False, False]
    names = ("x", "s", "gate_up", "up", "down")
    found = implementation.mlp_backward(inputs.grad_out, h, None, *arguments, needs)
    return {"out": out} | {name: grad for name, grad, need in zip(names, found, needs, strict=False) if need}


def naive_step(inputs: Layer) -> tuple[Tensor, ...]:
    """A loop over experts as models write it, differentiated by autograd."""
    x, topk_weights, gate_up, down = (
        t.detach().requires_grad_() for t in (inputs.x, inputs.topk_weights, inputs.gate_up[0], inputs.down[0])
    )
    out = torch.zeros_like(x)
    for e in range(down.shape[0]):
        token, k = torch.where(inputs.topk_ids == e)
        gate, up = (x[token] @ gate_up[e].t()).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].t()
        out = out.index_add(0, token, (y * topk_weights[token, k, None]).to(x.dtype))
    out.backward(inputs.grad_out)
    return out.detach(), x.grad, topk_weights.grad, gate_up.grad, down.grad
