"""Each operator alone against its floor: python -m benchmarks.kernels C D.

The floor of a product is a dense product of the same FLOPs, that of row movement is a copy of the same bytes, both
measured in the same run; `of floor` is floor time over the operator's. torch's grouped_mm on rows that are contiguous
already stands beside the products. Each result is checked against the reference first: what fails isn't timed.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.difference import relative_rms
from benchmarks.shapes import SHAPES, Shape, inputs, shape_names
from benchmarks.timing import graph_ms, queued_ms
from scatter_ops import cuda, reference

TOLERANCE = 1e-2  # relative RMS difference to the reference on the same bfloat16 inputs


class Operator(NamedTuple):
    """run takes the implementation: scatter_ops.cuda or the reference."""

    name: str
    run: Callable[[Any], Tensor]
    flops: float = 0.0
    bytes: float = 0.0
    grouped_mm: Callable[[], Tensor] | None = None


def operators(shape: Shape) -> Iterator[Operator]:
    T, D, F, E, K = shape
    layer = inputs(shape, torch.bfloat16, "cuda")
    order_N, offsets_E = cuda.route(layer.topk_ids, E)
    x_TD, weight, num_slots = layer.x, layer.gate_up, T * K
    rows_ND = cuda.dispatch(x_TD, order_N, offsets_E, K)
    grad_NH = torch.randn(num_slots, 2 * F, device="cuda", dtype=x_TD.dtype)
    flops, moved = 2.0 * num_slots * D * 2 * F, 2.0 * D * (num_slots + T)

    def linear(x: Tensor, grouped_in: bool, grouped_out: bool, w: Tensor = weight, transposed: bool = False):
        layout = (order_N, offsets_E, K, grouped_in, grouped_out, [], transposed)
        return lambda m: m.parallel_linear(x, [w], *layout)

    def weight_grad(x: Tensor, grouped_in: bool):
        return lambda m: m.parallel_linear_weight_grad(x, grad_NH, order_N, offsets_E, K, grouped_in, True)

    def forward_mm() -> Tensor:
        return torch.nn.functional.grouped_mm(rows_ND, weight.transpose(1, 2), offs=offsets_E)

    def backward_mm() -> Tensor:
        return torch.nn.functional.grouped_mm(grad_NH, weight, offs=offsets_E)

    def weight_mm() -> Tensor:
        return torch.nn.functional.grouped_mm(grad_NH.t(), rows_ND, offs=offsets_E)

    yield Operator("route", lambda m: m.route(layer.topk_ids, E)[0], bytes=8.0 * num_slots + 4.0 * num_slots)
    yield Operator("dispatch", lambda m: m.dispatch(x_TD, order_N, offsets_E, K), bytes=moved)
    weights = layer.topk_weights
    yield Operator("combine", lambda m: m.combine(rows_ND, weights, order_N, offsets_E, K, True), bytes=moved)
    yield Operator("linear, gathered to grouped", linear(x_TD, False, True), flops, 0.0, forward_mm)
    yield Operator("linear, grouped to grouped", linear(rows_ND, True, True), flops, 0.0, forward_mm)
    yield Operator("linear, grouped to scattered", linear(rows_ND, True, False), flops, 0.0, forward_mm)
    yield Operator("linear, backward to x", linear(grad_NH, True, True, weight, True), flops, 0.0, backward_mm)
    yield Operator("weight gradient, gathered x", weight_grad(x_TD, False), flops, 0.0, weight_mm)
    yield Operator("weight gradient, grouped x", weight_grad(rows_ND, True), flops, 0.0, weight_mm)


def floors(shape: Shape) -> tuple[float, float]:
    """Dense TFLOP/s of a product of the shape's FLOPs, and GB/s of a copy, read and written bytes counted."""
    rows, columns = shape.T * shape.K, 2 * shape.F
    x, w = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((rows, shape.D), (shape.D, columns)))
    dense = 2.0 * rows * shape.D * columns / queued_ms(lambda: x @ w) / 1e9
    target = torch.empty_like(x)
    return dense, 2 * x.nbytes / queued_ms(lambda: target.copy_(x)) / 1e6


def measure(name: str) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    dense, copy = floors(shape)
    rows = []
    for operator in operators(shape):
        ours, expected = operator.run(cuda).float(), operator.run(reference).float()
        error = relative_rms(ours, expected)
        if not error < TOLERANCE:
            raise ArithmeticError(f"{operator.name}: relative RMS difference to the reference {error:.3g}")
        del ours, expected
        short = operator.name == "route"  # the host is slower than the device there
        ms = (graph_ms if short else queued_ms)(lambda run=operator.run: run(cuda))
        row = {"shape": name, "operator": operator.name, "ms": ms, "error": error}
        if operator.flops:
            row |= {"TFLOP/s": operator.flops / ms / 1e9, "of floor": operator.flops / ms / 1e9 / dense}
        else:
            row |= {"GB/s": operator.bytes / ms / 1e6, "of floor": operator.bytes / ms / 1e6 / copy}
        if operator.grouped_mm is not None:
            row["against grouped_mm"] = queued_ms(operator.grouped_mm) / ms
        rows.append(row)
    return [*rows, {"shape": name, "operator": "floors", "TFLOP/s": dense, "GB/s": copy}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; B, C and D if none is named")
    arguments = parser.parse_args()
    rows = []
    for name in shape_names(parser, arguments.shapes):
        rows += measure(name)
        torch.cuda.empty_cache()
    report.append("kernels", rows)
    report.print_table("operators alone, bfloat16", rows)


if __name__ == "__main__":
    main()
