"""Few tokens, where a layer costs what reading its weights costs: python -m benchmarks.decode.

Forward from (x, topk_weights, topk_ids) to y, in a CUDA graph that goes through several copies of the weights, so that
none is in the cache when it is read. GB/s counts the weights of the distinct experts that were hit, once, and nothing
else; the copy beside it counts bytes read and written. Results are checked against the reference first.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.difference import relative_rms
from benchmarks.rivals import OURS, Rival, add_rivals, available
from benchmarks.shapes import Inputs, Shape, inputs
from benchmarks.timing import median_ms, queued_ms
from benchmarks.training_step import TOLERANCE, expected_step, inference

MODELS = {"qwen3-30b": Shape(1, 2048, 768, 128, 8), "mixtral": Shape(1, 4096, 14336, 8, 2)}
TOKENS = (1, 16, 64, 256)
LEAST_BYTES = 200 * 2**20  # read between two uses of the same weights: several times the cache
MIN_CALLS = 8  # in one graph


def measure(model: str, num_tokens: int, implementations: dict[str, Rival]) -> list[dict[str, Any]]:
    """One row an implementation."""
    torch.compiler.reset()  # or rivals would be compiled for sizes of any kind from the second shape on
    shape = MODELS[model]._replace(T=num_tokens)
    layer = inputs(shape, torch.bfloat16, "cuda")
    experts = layer.topk_ids.unique().numel()
    weight_bytes = experts * 3 * shape.D * shape.F * layer.x.element_size()
    num_copies = -(-LEAST_BYTES // weight_bytes)
    expected = expected_step(layer)[0].float()
    rows = []
    for name, rival in implementations.items():
        copies = [copy_as_held(layer, rival) for _ in range(num_copies)]
        try:
            error = difference(inference(copies[0], rival.forward), expected)
            ms = rotating_ms([lambda c=c, f=rival.forward: inference(c, f) for c in copies])
        except (ArithmeticError, RuntimeError) as reason:
            if rival is OURS:
                raise
            print(f"{model}, T = {num_tokens}: skipped: {name}: {str(reason)[:200]}")
            continue
        row = {"model": model, "T": num_tokens, "experts": experts, "implementation": name, "us": 1e3 * ms}
        rows.append(row | {"GB/s": weight_bytes / ms / 1e6, "error": error})
    return rows


def difference(out: Tensor, expected: Tensor) -> float:
    """Relative RMS difference; raises if it is too large."""
    error = relative_rms(out, expected)
    if not error < TOLERANCE:
        raise ArithmeticError(f"relative RMS difference to the reference {error:.3g}")
    return error


def copy_as_held(layer: Inputs, rival: Rival) -> Inputs:
    return dataclasses.replace(layer, gate_up=rival.gate_up(layer.gate_up.clone()), down=layer.down.clone())


def rotating_ms(functions: list[Callable[[], Tensor]]) -> float:
    """Milliseconds of one call, the functions taking turns in a replayed graph."""
    for function in functions:
        function()
    calls = -(-MIN_CALLS // len(functions)) * len(functions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            functions[call % len(functions)]()
    return median_ms(graph.replay, repeats=10, warmup=2) / calls


def copy_bandwidth() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / queued_ms(lambda: target.copy_(source)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    add_rivals(parser)
    arguments = parser.parse_args()
    implementations = {"scatter_moe": OURS, **dict(available(arguments.rivals))}
    rows = []
    for model in arguments.models:
        for num_tokens in arguments.tokens:
            rows += measure(model, num_tokens, implementations)
            torch.cuda.empty_cache()
    report.append("decode", rows, copy_gb_per_s=copy_bandwidth())
    report.print_table("decode, bfloat16", rows)


if __name__ == "__main__":
    main()
