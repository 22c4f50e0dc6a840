"""The body of experts that compute all tokens: the same values as of a loop over each expert's own rows.

A tensor that all experts read and that has a row for each token is `Gathered`, whoever made it; parameters are
`PerExpert` or `Shared`. What a mask keeps of rows, `expert(x * mask)`, is the rows themselves where these count: those
of the expert's own tokens, all others being weighted with zero. Where tokens are counted by several dims, every step of
the body is written anew on one.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fx_passes.batched.row_graph import RowGraph
from fx_passes.body.unify import Unifier
from fx_passes.body.values import (
    Body,
    Gathered,
    Op,
    SlotGathered,
    Value,
    map_values,
    nested_values,
    rank,
)
from fx_passes.dense.columns import ANY_SLOT, Tokens, masked, tokens_of_expert
from fx_passes.graph.ops import fake_tensor, known_tensor, normalized_dim, same_size, sizes_of
from fx_passes.region import Rejected, mismatches_rejected
from fx_passes.rules.row_wise import ALONG_DIM, DIM_ARGUMENT, MATMUL, NORMS, POINTWISE, REDUCTIONS, RESHAPES


@dataclass(frozen=True)
class Scaling:
    """Multiplication of experts' rows with a number, as `node` does it."""

    number: float
    node: fx.Node = field(compare=False, repr=False)


def token_body(
    outputs: tuple[fx.Node, ...], counted: tuple[Tokens, ...], scaling: Scaling | None = None
) -> tuple[Body, frozenset[fx.Node], frozenset[fx.Node]]:
    """The body that computes `outputs[i]`, of which the tokens `counted[i]` alone are not weighted with zero, then
    `scaling`; the nodes of all copies, and the masks that these apply to rows.

    Raises:
        Rejected: where the experts compute different things, or something that no rule speaks of.
    """
    walk = _TokenUnifier(tuple(known_tensor(outputs[0]).shape[:-1]), counted)
    with mismatches_rejected():
        root = walk.value(outputs)
    if scaling is not None:
        root = Op("mul", scaling.node, (root, scaling.number), {}, has_rows=True)
        walk.values.append(root)
    body = Body(root, tuple(walk.values), frozenset(walk.computed()))
    flat = _Flattened(body, walk.tokens).body if len(walk.tokens) > 1 else body
    return flat, body.nodes, frozenset(walk.masks_of_rows)


class _TokenUnifier(Unifier):
    """What all copies share comes from outside; it has rows if its first dims are those of the tokens."""

    def __init__(self, tokens: tuple[Any, ...], counted: tuple[Tokens, ...]) -> None:
        super().__init__((), tuple(own.expert for own in counted))
        self.tokens = tokens
        self.counted = counted
        self.masks_of_rows: set[fx.Node] = set()

    def computed(self) -> set[fx.Node]:
        """What the copies compute: neither inputs nor parameters."""
        return {node for nodes, value in self.memo.items() if isinstance(value, Op) for node in nodes} | self._taken

    def _derive(self, nodes: tuple[fx.Node, ...]) -> Value:
        kept = [self._kept(node, own) for node, own in zip(nodes, self.counted, strict=True)]
        rows = tuple(found[0] for found in kept if found is not None)
        if len(rows) < len(nodes):
            return super()._derive(nodes)
        self._taken.update(nodes)
        self.masks_of_rows.update(found[1] for found in kept if found is not None)
        return self.value(rows)

    def _kept(self, node: fx.Node, own: Tokens) -> tuple[fx.Node, fx.Node] | None:
        """(rows, mask) where `node` is `rows * mask` and the mask holds for all tokens that count."""
        for rows, mask, instead in masked(node):
            tokens = tokens_of_expert(mask, len(self.tokens), instead)
            has_all = tokens in (own, replace(own, slot=ANY_SLOT))
            if has_all and len(sizes_of(rows)) == len(self.tokens) + 1 and _have_one_dtype(rows, node):
                return rows, mask
        return None

    def _gathered(self, nodes: tuple[fx.Node, ...]) -> Gathered | SlotGathered | None:
        first, tensor, count = nodes[0], fake_tensor(nodes[0]), len(self.tokens)
        if any(node is not first for node in nodes) or tensor is None or isinstance(tensor, torch.nn.Parameter):
            return None
        has_tokens = tensor.dim() == count + 1 and all(map(same_size, tensor.shape, self.tokens))
        return Gathered(first, first) if has_tokens and tensor.is_floating_point() else None

    def _is_inner(self, node: fx.Node) -> bool:
        return False


def _have_one_dtype(node: fx.Node, other: fx.Node) -> bool:
    return known_tensor(node).dtype == known_tensor(other).dtype


class _Flattened:
    """`body`, whose rows are counted by dims of sizes `tokens`, with rows in dim 0 alone."""

    def __init__(self, body: Body, tokens: tuple[Any, ...]) -> None:
        self._count, self._tokens = len(tokens), tokens
        rows = 1
        for size in tokens:
            rows = rows * size
        self._graph = RowGraph((), {"N": rows})
        self._known: dict[Value, Value] = {}
        root = self._value(body.root)
        self.body = Body(root, tuple(self._known.values()), body.nodes)

    def _value(self, value: Value) -> Value:
        if value not in self._known:
            self._known[value] = self._derive(value)
        return self._known[value]

    def _derive(self, value: Value) -> Value:
        if isinstance(value, Gathered):
            return self._graph.leaf(Gathered, value.source, known_tensor(value.source).shape[self._count :])
        if not isinstance(value, Op) or not value.has_rows:
            return value
        args, kwargs = map_values((value.args, value.kwargs), self._value)
        if value.name in POINTWISE | MATMUL | NORMS | {"dropout"}:
            return self._graph.same_op(value.node, args, kwargs, ("",) * self._count)
        if value.name in REDUCTIONS | ALONG_DIM:
            args, kwargs = self._from_the_end(value, list(args), kwargs)
            return self._graph.same_op(value.node, tuple(args), kwargs, ("",) * self._count)
        if value.name == "getitem":
            return self._graph.same_op(value.node, (args[0], self._index(value)), kwargs, ("",) * self._count)
        if value.name in RESHAPES and all(map(same_size, known_tensor(value.node).shape, self._tokens)):
            features = known_tensor(value.node).shape[self._count :]
            return self._graph.op(value.node, "reshape", "reshape", (args[0], -1, *features), {}, tuple(features))
        raise _refused(value)

    def _from_the_end(self, op: Op, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Dims counted from the last, which are the same with fewer dims of tokens."""
        place, operand = DIM_ARGUMENT.get(op.name, 1), next(nested_values(op.args), None)
        dims = (rank(operand) or 0) + (op.name in ("unsqueeze", "stack"))
        given = args[place] if len(args) > place else kwargs.get("dim")
        if given is None or not dims:
            raise _refused(op)
        own = [normalized_dim(dim, dims) - dims for dim in (given if isinstance(given, (tuple, list)) else (given,))]
        if any(dims + dim < self._count for dim in own):
            raise _refused(op)
        counted = own if isinstance(given, (tuple, list)) else own[0]
        if len(args) > place:
            return [*args[:place], counted, *args[place + 1 :]], kwargs
        return args, kwargs | {"dim": counted}

    def _index(self, op: Op) -> Any:
        """`[..., a:b]`, `[:, :, a:b]`: the items that index a row."""
        index = op.args[1]
        if fake_tensor(op.node.all_input_nodes[0]) is None:
            return index
        items = index if isinstance(index, tuple) else (index,)
        if items[0] is Ellipsis:
            own = items[1:]
        elif items[: self._count] == (slice(None),) * self._count:
            own = items[self._count :]
        else:
            raise _refused(op)
        if Ellipsis in own or sum(item is not None for item in own) > (rank(op.args[0]) or 0) - self._count:
            raise _refused(op)
        return (items[0], *own)


def _refused(op: Op) -> Rejected:
    return Rejected("body_is_row_wise", op.node, f"`{op.name}` is not known to keep rows apart")
