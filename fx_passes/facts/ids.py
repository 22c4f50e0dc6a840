"""What is known of topk_ids: their dims, whether a token's ids are distinct, whether all are below a number.

T tokens, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import fx

from fx_passes.facts.statements import TOKENS_BY_BATCH, Dims
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import (
    arg,
    fake_tensor,
    is_last_dim,
    keeps_last_dim,
    known_tensor,
    op_name,
    same_size,
    same_sizes,
    sizes_of,
)

_KEEPS_ENTRIES = frozenset("to long int contiguous detach clone".split())
_PRESERVES_VALUES = _KEEPS_ENTRIES | frozenset("view reshape squeeze unsqueeze flatten".split())


def ids_dims(ids: fx.Node) -> tuple[str, ...] | None:
    value = fake_tensor(ids)
    if value is None or value.dtype not in (torch.int64, torch.int32):
        return None
    if value.dim() == 2 and _is_one_of_three_dims(ids):
        return TOKENS_BY_BATCH
    return {1: ("T",), 2: ("T", "K"), 3: (*TOKENS_BY_BATCH, "K")}.get(value.dim())


def _is_one_of_three_dims(ids: fx.Node) -> bool:
    """Whether `ids` [B, S] have one entry for each row of a tensor [B, S, E] or [B, S, K]: `scores.argmax(-1)`."""
    name, source = op_name(ids), arg(ids, 0, "input")
    if name in _KEEPS_ENTRIES:
        return _is_one_of_three_dims(source)
    if name == "getitem" and op_name(source) == "max" and ids.args[1] == 1:
        source = arg(source, 0, "input")
    elif name not in ("argmax", "squeeze", "select") and not (name == "getitem" and fake_tensor(source) is not None):
        return False
    return len(sizes_of(source)) == 3 and same_sizes(sizes_of(source)[:2], sizes_of(ids))


def has_slots(ids: fx.Node) -> bool:
    """Whether `ids` have a dim of slots, or one of all tokens' slots."""
    return known_tensor(ids).dim() > 1 and ids_dims(ids) != TOKENS_BY_BATCH


def is_single_choice(ids: fx.Node) -> bool:
    """Whether a token has one expert at most."""
    return fake_tensor(ids) is not None and (not has_slots(ids) or same_size(sizes_of(ids)[-1], 1))


def num_choices(ids: fx.Node) -> int:
    """K of `ids` [T, K]."""
    return int(sizes_of(ids)[-1]) if has_slots(ids) else 1


def num_tokens(ids: fx.Node) -> int | torch.SymInt:
    tensor = known_tensor(ids)
    return tensor.numel() // tensor.shape[-1] if has_slots(ids) else tensor.numel()


def ids_are_distinct(node: fx.Node) -> bool:
    """Whether `node` holds the indices of a topk over the last dim, through value-preserving operations only.

    Those without a gate are nobody's.
    """
    gated = gated_ids(node)
    if gated is not None:
        return ids_are_distinct(gated.ids)
    if _is_written(node):
        return False
    name, source = op_name(node), arg(node, 0, "input")
    if name == "getitem" and op_name(source) in ("topk", "sort") and node.args[1] == 1:
        tensor = fake_tensor(arg(source, 0, "input"))
        dim = arg(source, 2 if op_name(source) == "topk" else 1, "dim", -1)
        return tensor is not None and tensor.dim() >= 2 and is_last_dim(dim, arg(source, 0, "input"))
    if name == "getitem" and _keeps_columns(node.args[1]):
        return ids_are_distinct(source)
    if name in _PRESERVES_VALUES and _keeps_rows(node):
        return ids_are_distinct(source)
    if name == "argsort":
        return is_last_dim(arg(node, 1, "dim", -1), node)
    return False


def _keeps_columns(index: object) -> bool:
    return isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], slice)


def _keeps_rows(node: fx.Node) -> bool:
    """Whether the ids of a token still stand beside each other, and are what they were."""
    after = fake_tensor(node)
    if op_name(node) in ("to", "long", "int"):
        return after is not None and after.dtype in (torch.int32, torch.int64)
    return keeps_last_dim(node)


def classes_that_occur(ids: fx.Node, num_classes: int) -> int:
    """`one_hot` may have been told of more classes than the router chooses from."""
    columns = num_columns(ids)
    return num_classes if columns is None else min(columns, num_classes)


def ids_are_below(node: fx.Node, num_experts: int) -> bool:
    """Whether `node` holds indices of one of `num_experts` columns, through value-preserving operations only."""
    return num_columns(node) == num_experts


def num_columns(node: fx.Node) -> int | None:
    """The number of columns that `node` holds indices of, through value-preserving operations only."""
    if _is_written(node):
        return None
    name, source = op_name(node), arg(node, 0, "input")
    if name == "getitem" and op_name(source) in ("topk", "sort", "max") and node.args[1] == 1:
        return _size_along(arg(source, 0, "input"), arg(source, 2 if op_name(source) == "topk" else 1, "dim", -1))
    if name in ("argmax", "argsort"):
        return _size_along(source, arg(node, 1, "dim", -1 if name == "argsort" else None))
    if name in _PRESERVES_VALUES or (name == "getitem" and fake_tensor(source) is not None):
        return num_columns(source) if isinstance(source, fx.Node) and ids_dims(node) is not None else None
    return None


def are_nonnegative(ids: fx.Node) -> bool:
    """Whether it is known that no id is negative, which would count experts from the end."""
    if num_columns(ids) is not None:
        return True
    lowest = arg(ids, 1, "min") if op_name(ids) in ("clamp", "clip") and not _is_written(ids) else None
    return type(lowest) is int and lowest >= 0


def _is_written(node: fx.Node) -> bool:
    return any(writers_of(node))


def rows_as_ids(one_hot: fx.Node, dims: Dims) -> fx.Node:
    """Ids of a tensor whose last dim has at most one 1 beside zeros, for each token.

    They are [T], [T, 1] or, where the tokens are in two `dims`, [B, S, 1]. A node of no graph stands for them, until
    `rows_of_ids` are asked for to compute them.
    """
    known = one_hot.meta.setdefault("scatter_moe_ids", {})
    if dims not in known:
        tensor = known_tensor(one_hot)
        tokens = tensor.numel() // tensor.shape[-1]
        shapes = {("T",): (tokens,), ("T", "K"): (tokens, 1), TOKENS_BY_BATCH: (*tensor.shape[:-1], 1)}
        node = fx.Graph().placeholder(f"{one_hot.name}_ids")
        node.meta["example_value"] = tensor.new_empty(shapes[dims], dtype=torch.int64)
        node.meta["scatter_moe_one_hot"] = one_hot
        known[dims] = node
    return known[dims]


def rows_of_ids(ids: fx.Node) -> fx.Node | None:
    """The tensor whose rows `ids` stand for."""
    return ids.meta.get("scatter_moe_one_hot")


@dataclass(frozen=True)
class Gated:
    """Those of `ids` whose gate, in a table [T, E], compares so with a number; E instead of the others."""

    gates: fx.Node
    ids: fx.Node
    comparison: str
    number: float


def ids_of_gates(gates: fx.Node, ids: fx.Node, comparison: str, number: float) -> fx.Node:
    """`ids` without those whose gate is closed, with tokens in as many dims as `gates` has them.

    A node of no graph stands for them, until `gated_ids` are asked for to compute them.
    """
    known = gates.meta.setdefault("scatter_moe_gated", {})
    key = ids, comparison, number
    if key not in known:
        node = fx.Graph().placeholder(f"{ids.name}_gated")
        sizes = (*sizes_of(gates)[:-1], num_choices(ids))
        node.meta["example_value"] = known_tensor(ids).new_empty(sizes)
        node.meta["scatter_moe_gates"] = Gated(gates, *key)
        known[key] = node
    return known[key]


def gated_ids(ids: fx.Node) -> Gated | None:
    """What `ids_of_gates` was given."""
    return ids.meta.get("scatter_moe_gates")


def listings_of_gates(ids: fx.Node) -> list[fx.Node]:
    """The nodes that list the gates which are not zero, where `ids` are those of such gates."""
    gated = gated_ids(ids)
    return [node for node in gated.gates.users if op_name(node) == "nonzero"] if gated is not None else []


def sources_of_ids(ids: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of the graph that `ids` are computed from: themselves, where they stand in it."""
    one_hot, gated = rows_of_ids(ids), gated_ids(ids)
    if gated is not None:
        return gated.gates, gated.ids
    return (one_hot,) if one_hot is not None else (ids,)


def _size_along(scores: object, dim: object) -> int | None:
    """The size of the last dim of `scores`, if that is `dim`."""
    tensor = fake_tensor(scores)
    if tensor is None or dim not in (-1, tensor.dim() - 1):
        return None
    return tensor.shape[-1] if isinstance(tensor.shape[-1], int) else None
