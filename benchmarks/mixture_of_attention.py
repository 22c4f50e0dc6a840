"""Mixture of attention against the same on torch's grouped_mm: python -m benchmarks.mixture_of_attention [--tiny].

32 query heads of 128 are active for each token, of 8 sequences of 2048, with d 4096: K of E = 8 K experts have 32 / K
heads each, and as many heads of keys and values are shared by all. Four ways of running it, on the same parameters:

    scatter_moe       `MixtureOfAttention`: both projections read their rows where they are and write them where they go
    grouped_mm        sort, copy each token's row K times, torch's grouped_mm, copy the result to the order of slots;
                      for the output projection the same again, then the weighted sum
    loop              one expert after the other, both projections
    dense             no experts: one projection of 32 heads and the same heads of keys and values; what is computed
                      beside routing is the same

Routing, keys, values and the call of scaled_dot_product_attention are the same in all. The first three must agree
before anything is timed. All take turns; a ratio is dense time over theirs within a round, the median over rounds is
reported. A step is forward and backward to x and to all parameters. `peak` is what a step needs over what there was
before it.

B sequences, S positions, T = B * S tokens, K experts per token, N = T * K slots, E experts, D model width, H heads of
an expert, d head width.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from benchmarks.difference import relative_rms
from benchmarks.timing import peak_gib, queued_ms
from scatter_moe import MixtureOfAttention
from scatter_moe.routers import TopKRouter

TOLERANCE = 2e-2  # relative RMS difference of two computations in bfloat16
Implementation = Callable[[MixtureOfAttention, Tensor], Tensor]


class Sizes(NamedTuple):
    sequences: int
    length: int
    d_model: int
    active_heads: int
    head_dim: int


TOP_K = (1, 2, 4, 8)
FULL, TINY = Sizes(8, 2048, 4096, 32, 128), Sizes(2, 32, 64, 8, 16)


class Dense(nn.Module):
    """The projections of attention with as many active heads."""

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        width = sizes.active_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.d_model, width, False, device, dtype)
        self.o_proj = nn.Linear(width, sizes.d_model, False, device, dtype)


def attend(layer: MixtureOfAttention, x: Tensor, q_ND: Tensor) -> Tensor:
    """Causal attention of the queries in slot order, `[N, H * d]`, to the keys and values of x."""
    batch, length, _ = x.shape
    heads, head_dim = layer.num_heads, layer.head_dim
    q = q_ND.view(batch, length, -1, heads, head_dim).permute(0, 3, 2, 1, 4)
    k, v = (proj(x).unflatten(-1, (heads, head_dim)).transpose(1, 2) for proj in (layer.k_proj, layer.v_proj))
    y = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, enable_gqa=True)
    return y.view_as(q).permute(0, 3, 2, 1, 4).reshape(-1, heads * head_dim)


def scatter_moe(layer: MixtureOfAttention, x: Tensor) -> Tensor:
    return layer(x)


def grouped_mm(layer: MixtureOfAttention, x: Tensor) -> Tensor:
    x_TD = x.flatten(0, 1)
    topk_weights, topk_ids, _ = layer.router(x_TD)
    top_k = topk_ids.shape[1]
    expert, order = topk_ids.flatten().sort(stable=True)
    counts = torch.zeros(layer.num_experts, dtype=torch.int32, device=x.device)
    offsets = counts.index_add(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0, dtype=torch.int32)

    def project(rows: Tensor, weight: Tensor) -> Tensor:
        """Rows sorted by expert in, slot order out."""
        y = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
        return torch.zeros_like(y).index_copy(0, order, y)

    q = project(x_TD.index_select(0, order // top_k), layer.q_proj.weight)
    y = project(attend(layer, x, q).index_select(0, order), layer.o_proj.weight)
    return (y.unflatten(0, (-1, top_k)) * topk_weights[..., None]).to(y.dtype).sum(1).view_as(x)


def loop(layer: MixtureOfAttention, x: Tensor) -> Tensor:
    x_TD = x.flatten(0, 1)
    topk_weights, topk_ids, _ = layer.router(x_TD)
    chosen = [torch.where(topk_ids == e) for e in range(layer.num_experts)]
    q_TKD = x.new_zeros(*topk_ids.shape, layer.num_heads * layer.head_dim)
    for (token, slot), weight in zip(chosen, layer.q_proj.weight, strict=True):
        q_TKD = q_TKD.index_put((token, slot), F.linear(x_TD[token], weight))
    y_TKD = attend(layer, x, q_TKD.flatten(0, 1)).view_as(q_TKD)
    out = torch.zeros_like(x_TD)
    for (token, slot), weight in zip(chosen, layer.o_proj.weight, strict=True):
        y = F.linear(y_TKD[token, slot], weight) * topk_weights[token, slot, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out.view_as(x)


def dense(projections: Dense, layer: MixtureOfAttention, x: Tensor) -> Tensor:
    top_k = projections.q_proj.out_features // (layer.num_heads * layer.head_dim)
    q = projections.q_proj(x).flatten(0, 1).unflatten(-1, (top_k, -1)).flatten(0, 1)
    return projections.o_proj(attend(layer, x, q).view(*x.shape[:2], -1))


def step(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], grad_out: Tensor
) -> list[Tensor]:
    """Output, and gradients of x and of the parameters."""
    out = function(x)
    return [out, *torch.autograd.grad(out, [x, *parameters], grad_out)]


def check(results: dict[str, list[Tensor]]) -> dict[str, float]:
    """Largest relative RMS difference to the loop over all tensors; raises if one is too large."""
    errors = {}
    for name, tensors in results.items():
        pairs = zip(tensors, results["loop"], strict=True)
        errors[name] = max(relative_rms(a, b) for a, b in pairs)
        if not errors[name] < TOLERANCE:
            raise ArithmeticError(f"{name}: relative RMS difference to the loop {errors[name]:.3g}")
    return errors


def measure(sizes: Sizes, top_k: int, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """One row an implementation."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    torch.manual_seed(0)
    num_experts, heads = 8 * top_k, sizes.active_heads // top_k
    # Logits in float32: a choice that rounding flips would tell one implementation's results from another's.
    settings = {"renormalize": False, "logits_dtype": torch.float32, "device": device, "dtype": dtype}
    router = TopKRouter(sizes.d_model, num_experts, top_k, **settings)
    layer = MixtureOfAttention(router, sizes.d_model, num_experts, heads, sizes.head_dim, device=device, dtype=dtype)
    projections = Dense(sizes, device, dtype)
    x = torch.randn(sizes.sequences, sizes.length, sizes.d_model, device=device, dtype=dtype, requires_grad=True)
    grad_out = torch.randn_like(x)

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "scatter_moe": functools.partial(scatter_moe, layer),
        "grouped_mm": functools.partial(grouped_mm, layer),
        "loop": functools.partial(loop, layer),
    }
    if compiled:
        functions |= {f"{name}, compiled": torch.compile(functions[name]) for name in ("scatter_moe", "grouped_mm")}
    parameters = {name: list(layer.parameters()) for name in functions}
    steps = {name: functools.partial(step, f, x, parameters[name], grad_out) for name, f in functions.items()}
    errors = check({name: run() for name, run in steps.items()})
    functions["dense"] = functools.partial(dense, projections, layer)
    dense_parameters = [*projections.parameters(), *layer.k_proj.parameters(), *layer.v_proj.parameters()]
    steps["dense"] = functools.partial(step, functions["dense"], x, dense_parameters, grad_out)

    def inference(function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return function(x)

    timed = {("forward", name): functools.partial(inference, f) for name, f in functions.items()}
    timed |= {("step", name): run for name, run in steps.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for _ in range(rounds):
        for key, function in timed.items():
            times[key].append(queued_ms(function, calls=4))
    return [
        {"K": top_k, "E": num_experts, "heads of an expert": heads, "implementation": name}
        | _cells(times, name)
        | {"peak_gib": _peak(steps[name]), "difference": errors.get(name)}
        for name in functions
    ]


def _cells(times: dict[tuple[str, str], list[float]], name: str) -> dict[str, float]:
    cells = {}
    for what in ("forward", "step"):
        measured = times[what, name]
        cells[f"{what}_ms"] = statistics.median(measured)
        cells[f"{what}_ratio"] = statistics.median(d / t for d, t in zip(times[what, "dense"], measured, strict=True))
    return cells


def _peak(run: Callable[[], Any]) -> float | None:
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated() / 2**30
    return (peak_gib(run) or 0.0) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-k", type=int, nargs="+", default=TOP_K, choices=TOP_K)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="scatter_moe and grouped_mm under torch.compile too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, whose results are not kept")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    rows = []
    for top_k in arguments.top_k:
        rows += measure(sizes, top_k, arguments.rounds, arguments.compiled)
        print(f"K = {top_k} done", flush=True)
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not arguments.tiny:
        report.append("mixture_of_attention", rows, rounds=arguments.rounds, **sizes._asdict())
    report.print_table("mixture of attention", rows)


if __name__ == "__main__":
    main()
