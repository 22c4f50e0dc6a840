"""Finds where a loop adds an expert's rows to its output.

    out.index_add_(0, tokens, value)    out = out.index_add(0, tokens, value)    counts a token that occurs twice, twice
    out[tokens] += value                out[tokens] = out[tokens] + value        keeps one of them
    out[tokens] = value                                                          keeps the last of all

`tokens` must come from a mask of one expert, or be its slots where the output has a row for each; everything else in
the graph is none of our business.
"""

from collections.abc import Iterable
from typing import Any

from torch import fx

from fx_passes.facts import chosen, chosen_tokens, fact
from fx_passes.ops import arg, op_name
from fx_passes.region import Accumulation, Rejected


def accumulations(graph: fx.Graph) -> dict[fx.Node, list[Accumulation]]:
    """All accumulations of expert rows, by the accumulator they start from, in graph order."""
    groups: dict[fx.Node, list[Accumulation]] = {}
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        found = _accumulation(node)
        if found is not None:
            start = base.get(found.accumulator, found.accumulator)
            base[found.result] = start
            groups.setdefault(start, []).append(found)
    return groups


def _accumulation(node: fx.Node) -> Accumulation | None:
    name = op_name(node)
    if name in ("index_add", "index_add_"):
        return _index_add(node)
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


def _add_by_index(node: fx.Node) -> Accumulation | None:
    accumulator, index, total = node.args
    if chosen(index) is None or not isinstance(total, fx.Node):
        return None
    operands = total.args if op_name(total) in ("add", "iadd", "add_") and not total.kwargs else ()
    reads = [operand for operand in operands[:2] if _reads(operand, accumulator, index)]
    if not any(_reads(operand, accumulator, index) for operand in total.all_input_nodes):
        return Accumulation(accumulator, index, total, (node,), node, counts_duplicates=False, assigns=True)
    if len(reads) != 1 or len(operands) != 2:
        raise Rejected(
            "accumulation_is_a_plain_sum",
            node,
            "`out[tokens] = ...` assigns something other than `out[tokens] + value`",
        )
    value = operands[1] if operands[0] is reads[0] else operands[0]
    return Accumulation(accumulator, index, value, (reads[0], total, node), node, counts_duplicates=False)


def _reads(operand: Any, accumulator: fx.Node, index: fx.Node) -> bool:
    return (
        isinstance(operand, fx.Node)
        and op_name(operand) == "getitem"
        and operand.args[0] is accumulator
        and (operand.args[1] is index or (fact(index) is not None and fact(operand.args[1]) == fact(index)))
    )


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
