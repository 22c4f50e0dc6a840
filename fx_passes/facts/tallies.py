"""Counts of slots that are made by adding ones to fresh zeros, in place or not, at once or in a statement of its own.

zeros(E).scatter_add_(0, ids.flatten(), ones)       or index_add_
zeros(T, E).scatter(1, ids, 1).sum(0)               or scatter_add(1, ids, ones), which counts an id each time

T tokens, K experts per token, E experts.
"""

from typing import Any

from torch import fx

from fx_passes.facts.ids import ids_dims
from fx_passes.facts.masks import flat_ids
from fx_passes.facts.statements import Counts
from fx_passes.graph.aliasing import inplace_users, is_read_before, storage_of, writers_of
from fx_passes.graph.ops import ZEROS, arg, fake_tensor, is_inplace, op_name, same_size, same_sizes, sizes_of

EXACT_BYTES = 4
"""Numbers of this size hold every count."""

_ADDITIONS = frozenset("scatter_add scatter_add_ index_add index_add_".split())
_SCATTERS = frozenset("scatter scatter_".split())
_ONES = frozenset("ones ones_like new_ones".split())
_FULL = frozenset("full full_like new_full".split())
_KEEP_ONES = frozenset("expand expand_as view reshape flatten to long int float".split())
NAMES = ZEROS | _ADDITIONS
"""What counts may be the result of: where a statement of its own fills zeros they keep their name."""


def tallied(node: fx.Node) -> Counts | None:
    """The counts that `node`, zeros [E] to which ones were added, is."""
    fill, tensor = fill_of(node), fake_tensor(node)
    if (
        fill is None
        or tensor is None
        or tensor.dim() != 1
        or type(tensor.shape[0]) is not int
        or tensor.dtype.itemsize < EXACT_BYTES
    ):
        return None
    ids = arg(fill, 2, "index")
    if op_name(fill) not in _ADDITIONS or ids_dims(ids) != ("T",) or arg(fill, 1, "dim") not in (0, -1):
        return None
    return Counts(flat_ids(ids) or ids, tensor.shape[0]) if _adds_ones(fill) else None


def tallied_table(table: Any, total: fx.Node) -> Counts | None:
    """The counts that `total`, the sum over tokens of `table`, zeros [T, E] to which ones were written, is."""
    fill = fill_of(table, total) if isinstance(table, fx.Node) else None
    ids = arg(fill, 2, "index") if fill is not None else None
    if fill is None or ids_dims(ids) != ("T", "K") or arg(fill, 1, "dim") not in (1, -1):
        return None
    adds, size = op_name(fill) in _ADDITIONS, sizes_of(table)
    ones = _adds_ones(fill) if adds else _sets_one(fill)
    if not ones or len(size) != 2 or type(size[1]) is not int or not same_size(size[0], sizes_of(ids)[0]):
        return None
    return Counts(ids, size[1], reduced=not adds)


def fill_of(node: fx.Node, before: fx.Node | None = None) -> fx.Node | None:
    """What filled the fresh zeros that `node` is, or made its copy of them: all that wrote to them, `before` that node.

    Nobody has read them earlier.
    """
    is_blank = op_name(node) in ZEROS
    writes = [write for write in inplace_users(node) if before is None or write < before] if is_blank else [node]
    fill = writes[0] if len(writes) == 1 else None
    zeros = arg(fill, 0, "input") if fill is not None else None
    if fill is None or op_name(fill) not in _ADDITIONS | _SCATTERS or op_name(zeros) not in ZEROS:
        return None
    writers = {writer for writer in writers_of(zeros) if before is None or writer < before}
    if writers != ({fill} if is_inplace(fill) else set()) or is_read_before(zeros, [fill]):
        return None
    return fill


def ids_added_by(node: fx.Node) -> fx.Node | None:
    """The ids by which something is added up in `node`, whether or not that counts them."""
    additions = (write for write in (node, *writers_of(node)) if op_name(write) in _ADDITIONS)
    ids = (flat_ids(index) for write in additions if isinstance(index := arg(write, 2, "index"), fx.Node))
    return next((found for found in ids if found is not None), None)


def fills_of(node: fx.Node) -> set[fx.Node]:
    """The write that filled the zeros which counts, or what may share memory with them, are in."""
    fill = fill_of(storage_of(node))
    return {fill} if fill is not None else set()


def _adds_ones(fill: fx.Node) -> bool:
    """Whether each index has a one added for it."""
    ones = arg(fill, 3, "source" if "index" in str(op_name(fill)) else "src")
    return arg(fill, 4, "alpha", 1) == 1 and _are_ones(ones, arg(fill, 2, "index"))


def _sets_one(fill: fx.Node) -> bool:
    """Whether one is written for each index."""
    one = arg(fill, 3, "value", fill.kwargs.get("src"))
    return "reduce" not in fill.kwargs and len(fill.args) <= 4 and (one == 1 or _are_ones(one, arg(fill, 2, "index")))


def _are_ones(node: Any, index: fx.Node) -> bool:
    """Whether `node` is ones, as many as `index` has entries."""
    if not same_sizes(sizes_of(node), sizes_of(index)) or any(writers_of(node)):
        return False
    while op_name(node) in _KEEP_ONES:
        node = arg(node, 0, "input")
    name = op_name(node) or ""
    place = 2 if name == "new_full" else 1
    return name in _ONES or (name in _FULL and arg(node, place, "fill_value") == 1)
