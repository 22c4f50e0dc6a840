"""Finds where a loop adds an expert's rows to its output.

    out.index_add_(0, tokens, value)    out = out.index_add(0, tokens, value)    counts a token that occurs twice, twice
    out.scatter_add_(0, tokens.view(-1, 1).expand(-1, D), value)              the same; scatter_reduce_(..., "sum")
    out.index_put_((tokens,), value, accumulate=True)                         the same
    out[tokens] += value                out[tokens] = out[tokens] + value        keeps one of them
    out[tokens] = value                 out.index_copy_(0, tokens, value)        keeps the last of all; index_put_

`tokens` must come from a mask of one expert, or be its slots where the output has a row for each, [N, D] or [T, K, D];
everything else in the graph is none of our business.
"""

from collections.abc import Iterable
from typing import Any

from torch import fx

from fx_passes.facts import chosen, chosen_tokens, fact, without_rest
from fx_passes.graph.ops import arg, op_name
from fx_passes.graph.row_index import have_one_width, repeated
from fx_passes.region import Accumulation, Rejected

Place = tuple[int, int]
"""A dim of a tensor that holds several outputs, and the number of one of them."""


def accumulations(graph: fx.Graph) -> dict[tuple[fx.Node, Place | None], list[Accumulation]]:
    """All accumulations of expert rows, by the output they belong to, in graph order.

    An output is the accumulator that they start from, or what that has at a place.
    """
    groups: dict[tuple[fx.Node, Place | None], list[Accumulation]] = {}
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        found = _accumulation(node)
        if found is not None:
            start = base.get(found.accumulator, found.accumulator)
            base[found.result] = start
            groups.setdefault((start, found.place), []).append(found)
    return groups


def _accumulation(node: fx.Node) -> Accumulation | None:
    name = op_name(node)
    if name in ("index_add", "index_add_"):
        return _index_add(node)
    if name in ("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"):
        return _scatter_add(node)
    if name in ("index_copy", "index_copy_"):
        return _index_copy(node)
    if name in ("index_put", "index_put_"):
        return _index_put(node)
    if name == "setitem":
        return _add_by_index(node)
    return None


def _index_add(node: fx.Node) -> Accumulation | None:
    accumulator, dim, tokens, value = (
        arg(node, at, name) for at, name in enumerate(("input", "dim", "index", "source"))
    )
    if chosen_tokens(tokens) is None or not isinstance(accumulator, fx.Node) or not isinstance(value, fx.Node):
        return None
    if dim != 0 or arg(node, 4, "alpha", 1) != 1:
        raise Rejected("accumulation_is_a_plain_sum", node, "index_add along another dim than the first, or with alpha")
    return Accumulation(accumulator, tokens, value, (node,), node, counts_duplicates=True)


def _index_copy(node: fx.Node) -> Accumulation | None:
    accumulator, dim, rows, value = (arg(node, at, name) for at, name in enumerate(("input", "dim", "index", "source")))
    if dim != 0 or chosen(rows) is None or not isinstance(accumulator, fx.Node) or not isinstance(value, fx.Node):
        return None
    return Accumulation(accumulator, rows, value, (node,), node, counts_duplicates=False, assigns=True)


def _index_put(node: fx.Node) -> Accumulation | None:
    """With `accumulate` it adds, without it assigns."""
    accumulator, indices, value = (arg(node, at, name) for at, name in enumerate(("input", "indices", "values")))
    index = without_rest(tuple(indices)) if isinstance(indices, (tuple, list)) else None
    if chosen(index) is None or not isinstance(accumulator, fx.Node) or not isinstance(value, fx.Node):
        return None
    adds = arg(node, 3, "accumulate", False)
    if type(adds) is not bool or (adds and chosen_tokens(index) is None):
        return None
    return Accumulation(accumulator, index, value, (node,), node, counts_duplicates=adds, assigns=not adds)


def _scatter_add(node: fx.Node) -> Accumulation | None:
    """Every value of a row goes to the same token."""
    accumulator, dim, index, value = (arg(node, at, name) for at, name in enumerate(("input", "dim", "index", "src")))
    tokens = repeated(index, lambda base: chosen_tokens(base) is not None)
    if tokens is None or not isinstance(accumulator, fx.Node) or not isinstance(value, fx.Node):
        return None
    name = str(op_name(node))
    is_sum = "reduce" not in name or (arg(node, 4, "reduce") == "sum" and arg(node, 5, "include_self", True))
    if dim != 0 or not is_sum or not have_one_width(index, value, accumulator):
        raise Rejected("accumulation_is_a_plain_sum", node, f"`{name}` that adds something else than rows")
    return Accumulation(accumulator, tokens, value, (node,), node, counts_duplicates=True)


def _add_by_index(node: fx.Node) -> Accumulation | None:
    accumulator, whole, total = node.args
    whole = without_rest(whole)
    place, index = _placed(whole)
    if chosen(index) is None or not isinstance(total, fx.Node):
        return None
    operands = total.args if op_name(total) in ("add", "iadd", "add_") and not total.kwargs else ()
    reads = [operand for operand in operands[:2] if _reads(operand, accumulator, whole)]
    if not any(_reads(operand, accumulator, whole) for operand in total.all_input_nodes):
        return Accumulation(accumulator, index, total, (node,), node, False, assigns=True, place=place)
    if len(reads) != 1 or len(operands) != 2:
        raise Rejected(
            "accumulation_is_a_plain_sum",
            node,
            "`out[tokens] = ...` assigns something other than `out[tokens] + value`",
        )
    value = operands[1] if operands[0] is reads[0] else operands[0]
    return Accumulation(accumulator, index, value, (reads[0], total, node), node, False, place=place)


def _placed(index: Any) -> tuple[Place | None, Any]:
    """(place, tokens) of an index like `e, tokens` or `tokens, e`, and else the index as it is."""
    first, last = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
    for dim, number, rows in ((0, first, last), (1, last, first)):
        if type(number) is int and number >= 0 and chosen_tokens(rows) is not None:
            return (dim, number), rows
    return None, index


def _reads(operand: Any, accumulator: fx.Node, index: fx.Node) -> bool:
    return (
        isinstance(operand, fx.Node)
        and op_name(operand) == "getitem"
        and operand.args[0] is accumulator
        and _pick_alike(without_rest(operand.args[1]), index)
    )


def _pick_alike(index: Any, other: Any) -> bool:
    return index == other or (fact(other) is not None and fact(index) == fact(other))


def closure(starts: Iterable[fx.Node], stops: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Everything computed from `starts`, up to and without `stops`."""
    seen: set[fx.Node] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in seen or node in stops:
            continue
        seen.add(node)
        stack.extend(node.users)
    return frozenset(seen)
