"""Masks of gates [T, E] that are open: not zero, or above a number that is not negative.

    gates != 0    gates > 0                           a one-hot tensor of the open slots
    gates[:, e] > 0    gates[:, e].nonzero()          where the expert has an open slot

Where gates are provably zero outside of the ids that each token chose, every such pair is one of their slots. A slot
whose gate is closed is nobody's. T tokens, K experts per token, E experts.
"""

import math
from typing import Any

from torch import fx

from fx_passes.facts.ids import ids_of_gates, num_tokens
from fx_passes.facts.masks import select
from fx_passes.facts.statements import TOKENS_BY_BATCH, Fact, OneHot
from fx_passes.graph.markers import Expert, expert_of, select_expert
from fx_passes.graph.ops import arg, fake_tensor, normalized_dim, only_pick, op_name, same_size, sizes_of
from fx_passes.graph.row_index import index_of

Comparison = tuple[str, float]
"""That of open gates with a number, which is false for zero."""

NOT_ZERO: Comparison = ("ne", 0)


def ids_behind(gates: Any, comparison: Comparison) -> fx.Node | None:
    """The ids [T, K] of the slots whose gates are open; None where gates may be so elsewhere."""
    tensor = fake_tensor(gates)
    if tensor is None or tensor.dim() not in (2, 3) or type(tensor.shape[-1]) is not int:
        return None
    from fx_passes.facts.sparsity import chosen_by  # which reads facts, as those of masks read this file

    ids = chosen_by(gates) if tensor.is_floating_point() else None
    is_of_all = ids is not None and same_size(num_tokens(ids), math.prod(tensor.shape[:-1]))
    return ids_of_gates(gates, ids, *comparison) if ids is not None and is_of_all else None


def compared(node: fx.Node) -> Fact | None:
    """`gates > 0`, `gates[:, e] != 0`, `gates >= 0.1`."""
    name, number = op_name(node), arg(node, 1, "other")
    name = {"greater": "gt", "greater_equal": "ge"}.get(name or "", name)
    if type(number) not in (int, float) or not (
        (name == "ne" and number == 0) or (name == "gt" and number >= 0) or (name == "ge" and number > 0)
    ):
        return None
    return open_gates(arg(node, 0, "input"), (str(name), number))


def open_gates(node: Any, comparison: Comparison = NOT_ZERO) -> Fact | None:
    """Where `node`, gates or the column of an expert among them, are open."""
    picked = _picked(node)
    if picked is None:
        return _one_hot(node, comparison)
    gates, dim, expert = picked
    return select(_one_hot(gates, comparison), dim, expert, keepdim=False)


def _one_hot(gates: Any, comparison: Comparison) -> OneHot | None:
    ids, sizes = ids_behind(gates, comparison), sizes_of(gates)
    tokens = ("T",) if len(sizes) == 2 else TOKENS_BY_BATCH
    return OneHot(ids, int(sizes[-1]), (*tokens, "E"), reduced=True) if ids is not None else None


def _picked(node: Any) -> tuple[fx.Node, int, Expert] | None:
    """(gates, dim, e) of `gates[:, e]`."""
    source = arg(node, 0, "input")
    rank = len(sizes_of(source))
    if fake_tensor(node) is None or not rank:
        return None
    if node.target is select_expert:
        pick = None if node.args[3] else (node.args[2], node.args[1])
    else:
        index = index_of(node)
        pick = only_pick(index, rank) if isinstance(index, tuple) and len(index) <= rank else None
    if pick is None:
        return None
    expert = pick[1] if type(pick[1]) is int else expert_of(pick[1])
    return (source, normalized_dim(pick[0], rank), expert) if expert is not None else None
