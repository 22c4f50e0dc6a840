"""Linear layers of an expert's own weight and bias, however they are written."""

from dataclasses import dataclass
from typing import Any

import torch

from fx_passes.body.values import Gathered, Op, PerExpert, Value, rank
from fx_passes.graph.ops import fake_tensor, same_size

Size = int | torch.SymInt


@dataclass(frozen=True)
class Linear:
    rows: Value
    weight: PerExpert
    bias: PerExpert | None
    transposed: bool

    @property
    def widths(self) -> tuple[Size, Size]:
        """Of the rows that go in, and of those that come out."""
        first, second = self.weight.shape
        return (first, second) if self.transposed else (second, first)


def as_linear(value: Any) -> Linear | None:
    """`F.linear(rows, W, b)`, `rows @ W`, `rows @ W + b` with the expert's own W and b."""
    if not isinstance(value, Op):
        return None
    if value.name == "linear":
        bias = value.arg(2, "bias")
        return _linear(value.args[0], value.args[1], bias, transposed=False)
    if value.name in ("matmul", "mm"):
        return _linear(value.args[0], value.args[1], None, transposed=True)
    if value.name == "addmm" and len(value.args) == 3 and not value.kwargs:
        bias, rows, weight = value.args
        return _linear(rows, weight, bias, transposed=True)
    terms = binary(value, ("add",))
    for product, bias in (terms, terms[::-1]) if terms is not None else ():
        inner = as_linear(product)
        if (
            inner is not None
            and inner.bias is None
            and isinstance(bias, PerExpert)
            and _dtype(value) == _dtype(product)
        ):
            return _linear(inner.rows, inner.weight, bias, inner.transposed != inner.weight.transposed)
    return None


def binary(value: Any, names: tuple[str, ...]) -> tuple[Any, Any] | None:
    if isinstance(value, Op) and value.name in names and len(value.args) == 2 and not value.kwargs:
        return value.args[0], value.args[1]
    return None


def same_rows(left: Value, right: Value) -> bool:
    if isinstance(left, Gathered) and isinstance(right, Gathered):
        return left.source is right.source and left.leading == right.leading
    return left is right


def _linear(rows: Value, weight: Any, bias: Any, transposed: bool) -> Linear | None:
    if not isinstance(weight, PerExpert) or weight.leading or not (bias is None or isinstance(bias, PerExpert)):
        return None
    if isinstance(bias, PerExpert) and (rank(bias) != 1 + bias.leading or _dtype(bias) != _dtype(weight)):
        return None
    linear = Linear(rows, weight, bias, transposed != weight.transposed)
    return linear if bias is None or same_size(bias.shape[0], linear.widths[1]) else None


def _dtype(value: Value) -> torch.dtype | None:
    tensor = fake_tensor(value.node)
    return tensor.dtype if tensor is not None else None
