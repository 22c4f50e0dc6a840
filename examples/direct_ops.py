"""The operators themselves: an expert layer from four calls, checked against a loop and timed beside it.

    python examples/direct_ops.py [--steps 50] [--device cpu]

`route` sorts the slots by expert, `parallel_linear` multiplies rows with their expert's weight, `combine` adds up a
token's experts: with anything between. `mlp` is all of it fused. Nothing is compiled here.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import scatter_moe  # noqa: F401  (registers torch.ops.scatter_moe)

ops = torch.ops.scatter_moe
TOKENS, TOP_K, EXPERTS, WIDTH, EXPERT_WIDTH = 1024, 2, 16, 128, 256


def with_a_loop(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, slot = torch.where(ids == e)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
        out.index_add_(0, token, F.linear(F.silu(gate) * up, down[e]) * weights[token, slot, None])
    return out


def with_parts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order, offsets = ops.route(ids, EXPERTS)
    # Reads each token's row where it is, writes rows sorted by expert.
    h = ops.parallel_linear(x, [gate_up], order, offsets, TOP_K, False, True, [])
    gate, up = h.chunk(2, -1)
    a = F.silu(gate) * up  # your own operations go here
    y = ops.parallel_linear(a, [down], order, offsets, 1, True, True, [])
    return ops.combine(y, weights, order, offsets, TOP_K, True)


def fused(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order, offsets = ops.route(ids, EXPERTS)
    return ops.mlp(x, weights, order, offsets, [gate_up], [], [down], [], [], [], "silu", "concatenated")


def step(layer: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output and every gradient of one training step."""
    out = layer(*arguments)
    wanted = [tensor for tensor in arguments if tensor.requires_grad]
    return out, *torch.autograd.grad(out.square().mean(), wanted)


def median_ms(layer: Callable[..., Tensor], arguments: tuple[Tensor, ...], steps: int) -> float:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step(layer, arguments)
        if arguments[0].is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="how often each way is timed")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    with torch.device(options.device):
        weights, ids = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(TOP_K)
        x = torch.randn(TOKENS, WIDTH, requires_grad=True)
        gate_up = torch.randn(EXPERTS, 2 * EXPERT_WIDTH, WIDTH).div_(WIDTH**0.5).requires_grad_()
        down = torch.randn(EXPERTS, WIDTH, EXPERT_WIDTH).div_(EXPERT_WIDTH**0.5).requires_grad_()
    arguments = (x, weights.requires_grad_(), ids, gate_up, down)

    expected = step(with_a_loop, arguments)
    table = Table("", "largest difference to the loop", "step, ms", title="One training step of the layer")
    for layer in track((with_a_loop, with_parts, fused), "measuring"):
        results = step(layer, arguments)
        differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, expected, strict=True)]
        ms = median_ms(layer, arguments, options.steps)
        table.add_row(layer.__name__.replace("_", " "), f"{max(differences):.1e}", f"{ms:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
