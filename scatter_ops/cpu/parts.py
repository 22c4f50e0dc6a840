"""In which parts the CPU takes the rows of the fused expert MLP: few calls for few rows, little memory for many."""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

from torch import Tensor

from scatter_ops.cpu.stacked import MAPPED_BYTES
from scatter_ops.grouping import Groups

BLOCK_ELEMENTS = 2**20


def at_once(num_rows: int, width: int, like: Tensor) -> bool:
    """Whether the rows of all experts are taken at once: while a product of this width takes no fresh pages."""
    return num_rows * width * like.itemsize < MAPPED_BYTES


def parts(groups: Groups, *rows: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Each expert's group and those of the rows (or None) that belong to it; without the sentinels' rows."""
    splits = (repeat(None) if tensor is None else groups.split(tensor) for tensor in rows)
    return zip(groups.each(), *splits, strict=False)


def blocks(*rows: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Blocks of rows (or None); the first tensor is the widest."""
    first = rows[0]
    assert first is not None
    step = max(1, BLOCK_ELEMENTS // max(1, first.shape[1]))
    if first.shape[0] <= step:
        return (rows,)
    return zip(*(repeat(None) if tensor is None else tensor.split(step) for tensor in rows), strict=False)
