"""Which rows an operation picks or adds to: an index of them, given alone or repeated along the columns.

R rows, D columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fx_passes.graph.markers import index_with_expert
from fx_passes.graph.ops import arg, fake_tensor, normalized_dim, op_name, same_size, sizes_of

_REPEATS = frozenset(("expand", "expand_as", "repeat", "view", "reshape", "unsqueeze"))


def index_of(node: fx.Node) -> Any:
    """What `node` indexes its first operand by, as square brackets have it; None where it does something else."""
    name, dim, index = op_name(node), arg(node, 1, "dim"), arg(node, 2, "index")
    if name == "getitem" or node.target is index_with_expert:
        return node.args[1]
    source = arg(node, 0, "input")
    if name in ("select", "index_select") and isinstance(dim, int):
        return (*[slice(None)] * normalized_dim(dim, len(sizes_of(source))), index)
    if name == "gather" and dim == 0 and have_one_width(index, source):
        return repeated(index, lambda base: len(sizes_of(base)) == 1)
    return None


def have_one_width(*nodes: Any) -> bool:
    """Whether all are matrices with as many columns."""
    widths = [tensor.shape[1] for tensor in map(fake_tensor, nodes) if tensor is not None and tensor.dim() == 2]
    return len(widths) == len(nodes) and all(same_size(width, widths[0]) for width in widths)


def repeated(index: Any, is_base: Callable[[fx.Node], bool]) -> fx.Node | None:
    """`tokens` of `tokens.view(-1, 1).expand(-1, D)` or the like, if they are such a base."""
    while isinstance(index, fx.Node) and not is_base(index):
        before, after = fake_tensor(arg(index, 0, "input")), fake_tensor(index)
        is_column = op_name(index) == "getitem" and index.args[1] == (slice(None), None)
        if not (is_column or op_name(index) in _REPEATS) or before is None or after is None:
            return None
        if not _repeats_rows(before, after):
            return None
        index = index.args[0]
    return index if isinstance(index, fx.Node) else None


def _repeats_rows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """[R] to [R, 1], or that to [R, D]. What makes [R, R] of [R] repeats it along the rows."""
    if after.dim() != 2 or not same_size(before.shape[0], after.shape[0]):
        return False
    return same_size((after if before.dim() == 1 else before).shape[1], 1) and before.dim() in (1, 2)
