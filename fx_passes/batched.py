"""The expert body of code that keeps pairs of tokens and experts in dims of their own: the same body, on one row dim.

    [N, F], [T, K, F]       a row for each slot, with gathered weights: W[ids]
    [E, T, F], [T, E, F]    a row for each pair of expert and token

`Batched` says of each node which of its dims count rows (its labels) and what one row is, in the words of
`fx_passes.body`. The nodes of that body are in a graph of their own, in which dim 0 counts all rows. An input gets its
meaning from where it stands: the dim that is lined up with the tokens of the rows is the dim of tokens.

T tokens, K experts per token, N = T * K slots, E experts, M = E * T pairs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.nn import functional as F

from fx_passes.body import Body, Gathered, Op, PerExpert, Shared, SlotGathered, Value, children, map_values
from fx_passes.ops import (
    arg,
    example,
    fake_tensor,
    is_inplace,
    known_tensor,
    normalized_dim,
    op_name,
    same_size,
    varargs,
)
from fx_passes.region import Rejected
from fx_passes.row_wise import NORMS, POINTWISE
from fx_passes.slots import inplace_users
from fx_passes.views import Dim, View, step, views_of

Labels = tuple[str, ...]
SLOTS: tuple[Labels, ...] = (("N",), ("T", "K"))
PAIRS: tuple[Labels, ...] = (("M",), ("E", "T"), ("T", "E"))

_PARTS = {"N": ("T", "K"), "M": ("E", "T")}
_ALONG_DIM = {"chunk": 2, "split": 2, "softmax": 1}
_MOVES = frozenset("view reshape flatten unflatten squeeze unsqueeze permute transpose swapaxes".split())


@dataclass(frozen=True, eq=False)
class Rows:
    """The first dims of a node count rows, each of which is a row of `value`.

    `unit` says where a dim of size one stands beside the vector of a row: "before", "after", or "" where none does.
    """

    labels: Labels
    value: Value
    unit: str = ""


@dataclass(frozen=True)
class Input:
    """A tensor from outside, or weights taken by the experts of rows, as each of the views that it is."""

    views: tuple[View, ...]

    def moved(self, move: Callable[[View], View | None]) -> "Input":
        moved = (move(view) for view in self.views)
        return Input(tuple(view for view in moved if view is not None))


@dataclass(frozen=True)
class Total:
    """`rows`, summed over the experts of each token."""

    rows: Value


Seen = Rows | Input | Total


class Batched:
    """Walks the nodes `inner`. `shapes`, SLOTS or PAIRS, are the dims in which rows may stand, `sizes` their sizes.

    `ids` are the experts of the slots.
    """

    def __init__(
        self,
        inner: frozenset[fx.Node],
        shapes: tuple[Labels, ...],
        sizes: dict[str, int | torch.SymInt],
        ids: fx.Node | None = None,
    ) -> None:
        self.inner, self.shapes, self.sizes, self.ids = inner, shapes, sizes, ids
        self.writes: set[fx.Node] = set()
        self.steps: set[fx.Node] = set()
        self._graph = fx.Graph()
        self._values: dict[Any, Value] = {}
        self._seen: dict[fx.Node, Seen | None] = {}

    def body(self, root: Value) -> Body:
        """The body of which `root` is the result."""
        values, stack = [], [root]
        while stack:
            value = stack.pop()
            if value not in values:
                values.append(value)
                stack.extend(children(value))
        seen = {node for node, what in self._seen.items() if isinstance(what, Rows)}
        return Body(root, tuple(values), frozenset(seen | self.steps))

    def seen(self, node: Any) -> Seen | None:
        """What `node` is once all is written to it; None where it is no tensor."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._seen:
            known = node in self.inner or self._picks(node) or self._weighs_repeated_tokens(node)
            found = self._rows(node) if known else Input(views_of(node))
            self._seen[node] = found
            self._seen[node] = self._written(node, found)
        return self._seen[node]

    def _rows(self, node: fx.Node) -> Seen | None:
        name = op_name(node)
        if fake_tensor(node) is None and name not in _ALONG_DIM:
            return None
        if name is None:
            raise Rejected("operations_are_known", node, f"an expert calls `{node.target}`")
        if is_inplace(node) and name in ("add_", "iadd"):
            return self.seen(node.args[0])
        if name in ("bmm", "matmul"):
            return self._product(node)
        if name == "einsum":
            return self._einsum(node)
        source = self.seen(arg(node, 0, "input"))
        if isinstance(source, Input):
            moved = self._picked(node, source) or source.moved(lambda view: step(node, view))
            if moved.views:
                return moved
        if isinstance(source, Rows) and name in _MOVES:
            return self._moved(node, source)
        if isinstance(source, Rows) and name == "getitem":
            return self._indexed(node, source)
        if isinstance(source, Rows) and name == "sum":
            return self._sum(node, source)
        return self._operation(node, name)

    # Weights and other inputs

    def _picked(self, node: fx.Node, source: Input) -> Input | None:
        """`W[ids]`."""
        index = picked_by(node)
        if index is None:
            return None
        labels = index_labels(index, self.ids)
        if labels is None:
            raise Rejected(
                "rows_are_taken_in_one_order", node, f"`{node.name}` is not taken by the experts of the rows"
            )
        own = tuple(("p", label) for label in labels)
        whole = Input(tuple(view for view in source.views if view.dims[:1] == ((0,),)))
        return whole.moved(lambda view: View(view.start, (*own, *view.dims[1:]), (*view.steps, node)))

    def _picks(self, node: fx.Node) -> bool:
        index = picked_by(node) if self.ids is not None else None
        return index is not None and index_labels(index, self.ids) is not None

    def _weighs_repeated_tokens(self, node: fx.Node) -> bool:
        """`x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)`, in front of all experts."""
        name, source = op_name(node), arg(node, 0, "input")
        if name in _MOVES and isinstance(source, fx.Node):
            return self._weighs_repeated_tokens(source)
        if name not in ("mul", "multiply") or ("M",) not in self.shapes:
            return False
        return any(_repeats(Input(views_of(operand))) for operand in node.all_input_nodes)

    def _resolve(self, source: Input, labels: Labels, *kinds: type) -> Value | None:
        """What a row of `source` is, whose first dims count rows as `labels` say; None where it is none of `kinds`."""
        for view in source.views:
            value = self._resolve_view(view, labels)
            if isinstance(value, kinds):
                self.steps.update(view.steps)
                return value
        return None

    def _resolve_view(self, view: View, labels: Labels) -> Value | None:
        stands: dict[str, int | str] = {}
        for label, dim in zip(labels, view.dims, strict=False):
            found = _place(label, dim)
            if found is None:
                return None
            stands.update(found)
        features = view.dims[len(labels) :]
        start = known_tensor(view.start)
        rest = tuple((dim,) for dim in range(start.dim()))
        if set(stands) == {"p"} or stands == {"E": 0}:
            return self._parameter(view.start, features, start)
        single = stands == {"N": 0} and self.sizes["K"] == 1
        if (stands == {"T": 0} or single) and start.dim() == 2 and features == rest[1:]:
            return self._leaf(Gathered, view.start, start.shape[1:])
        if not stands or features.count(()) != len(features):
            return None
        units = (1,) * len(features)
        if stands == {"T": 0, "K": 1} or (stands == {"N": 0} and (start.dim() == 1 or single)):
            return self._leaf(SlotGathered, view.start, units, trailing=len(units))
        if stands == {"T": 0, "E": 1}:
            return self._leaf(SlotGathered, view.start, units, trailing=len(units), table=True)
        return None

    def _parameter(self, stacked: fx.Node, features: tuple[Dim, ...], tensor: torch.Tensor) -> Value | None:
        own = tuple((dim,) for dim in range(1, tensor.dim()))
        if features not in (own, own[::-1]):
            return None
        return self._leaf(PerExpert, stacked, tensor.shape[1:], stacked=stacked, transposed=features != own)

    def _leaf(self, kind: type, source: fx.Node, sizes: Iterable[Any] | None = None, **settings: Any) -> Value:
        key = (kind, source, *settings.values())
        if key not in self._values:
            if kind is Shared:
                self._values[key] = Shared(source)
                return self._values[key]
            tensor = known_tensor(source)
            rows = () if kind is PerExpert else (self.sizes["N"],)
            node = self._graph.placeholder(source.name)
            node.meta = {key: source.meta[key] for key in _PLACE if key in source.meta}
            node.meta["example_value"] = _empty(tensor, (*rows, *(sizes or ())))
            self._values[key] = kind(node=node, **settings) if kind is PerExpert else kind(source, node, **settings)
        return self._values[key]

    # Products

    def _product(self, node: fx.Node) -> Seen:
        """Rows times an expert's matrix, or the matrix times rows as columns."""
        left, right = self.seen(node.args[0]), self.seen(arg(node, 1, "mat2"))
        for rows, weight, unit in ((left, right, "before"), (right, left, "after")):
            found = self._matrix_product(node, rows, weight, unit) if isinstance(weight, Input) else None
            if found is not None:
                return found
        raise Rejected("body_is_row_wise", node, f"`{op_name(node)}` is no product of a row and its expert's weights")

    def _matrix_product(self, node: fx.Node, rows: Seen | None, weight: Input, unit: str) -> Rows | None:
        rank = known_tensor(node).dim()
        matrices = weight.moved(lambda view: _as_matrices(view, rank, unit))
        for labels in (rows.labels,) if isinstance(rows, Rows) else self.shapes:
            vector = "" if unit == "before" and len(labels) == rank - 1 else unit
            if len(labels) != rank - (2 if vector else 1):
                continue
            value = self._row_of(rows, labels, vector, rank)
            parameter = self._resolve(matrices if vector else matrices.moved(_for_each_row), labels, PerExpert)
            if value is not None and isinstance(parameter, PerExpert):
                return Rows(labels, self._linear(node, value, parameter), vector)
        return None

    def _row_of(self, rows: Seen | None, labels: Labels, unit: str, rank: int) -> Value | None:
        """One row of `rows`, which stands in a product of `rank` dims with its vector in the place that `unit` says."""
        if isinstance(rows, Rows):
            return rows.value if rows.unit == unit and len(_features(rows.value)) == 1 else None
        if not isinstance(rows, Input):
            return None
        place = {"after": -1, "before": -2, "": None}[unit]

        def squeezed(view: View) -> View | None:
            dims = list(_padded(view.dims, rank))
            if place is not None and dims.pop(place) != ():
                return None
            return View(view.start, tuple(dims), view.steps)

        return self._resolve(rows.moved(squeezed), labels, Gathered)

    def _linear(self, node: fx.Node, rows: Value, weight: PerExpert) -> Value:
        width = weight.shape[1 if weight.transposed else 0]
        return self._emit(node, "linear", F.linear, (rows, weight), {}, (width,))

    def _einsum(self, node: fx.Node) -> Seen:
        equation = node.args[0]
        operands = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
            raise Rejected("body_is_row_wise", node, "an einsum of other than two operands")
        inputs, out = equation.replace(" ", "").split("->")
        if any(len(set(letters)) != len(letters) for letters in inputs.split(",")):
            raise Rejected("body_is_row_wise", node, f"einsum `{equation}` takes a diagonal")
        pairs = list(zip(inputs.split(","), map(self.seen, operands), strict=True))
        for rows, weight in (pairs, pairs[::-1]):
            found = self._einsum_linear(node, rows, weight, out) or self._einsum_total(node, rows, weight, out)
            if found is not None:
                return found
        raise Rejected("body_is_row_wise", node, f"einsum `{equation}` is no product of a row and its expert's weights")

    def _einsum_linear(self, node: fx.Node, rows: Any, weight: Any, out: str) -> Rows | None:
        (row_letters, row), (letters, matrix) = rows, weight
        contracted = [c for c in row_letters if c in letters and c not in out]
        counted, width = out[:-1], out[-1:]
        if not isinstance(matrix, Input) or len(contracted) != 1 or width not in letters or width in row_letters:
            return None
        if set(letters + row_letters) - set(out + contracted[0]):
            return None
        for labels in self._labels_by_letter(row, row_letters, counted):
            columns = matrix.moved(lambda view: _reordered(view, letters, counted, width + contracted[0]))
            parameter = self._resolve(columns, labels, PerExpert)
            value = self._einsum_row(row, row_letters, counted, contracted[0], labels)
            if value is not None and isinstance(parameter, PerExpert):
                return Rows(labels, self._linear(node, value, parameter))
        return None

    def _labels_by_letter(self, row: Any, letters: str, counted: str) -> tuple[Labels, ...]:
        if not isinstance(row, Rows):
            return tuple(labels for labels in self.shapes if len(labels) == len(counted))
        names = dict(zip(letters, row.labels, strict=False))
        return (tuple(names[c] for c in counted),) if set(counted) == set(names) else ()

    def _einsum_row(self, row: Any, letters: str, counted: str, vector: str, labels: Labels) -> Value | None:
        if isinstance(row, Rows):
            is_vector = len(letters) == len(row.labels) + 1 and letters[-1] == vector
            return row.value if not row.unit and is_vector else None
        if not isinstance(row, Input):
            return None
        return self._resolve(row.moved(lambda view: _reordered(view, letters, counted, vector)), labels, Gathered)

    def _einsum_total(self, node: fx.Node, rows: Any, weights: Any, out: str) -> Total | None:
        """`einsum("tkd,tk->td", y, weights)`."""
        (row_letters, row), (letters, table) = rows, weights
        if not isinstance(row, Rows) or row.unit or not isinstance(table, Input) or len(row_letters) != 3:
            return None
        names = dict(zip(row_letters, row.labels, strict=False))
        if [names.get(c) for c in out] != ["T", None] or out[-1] != row_letters[-1] or set(letters) != set(names):
            return None
        columns = table.moved(lambda view: _reordered(view, letters, "".join(names), " "))
        value = self._resolve(columns, row.labels, SlotGathered)
        if value is None:
            return None
        return Total(self._emit(node, "mul", torch.mul, (row.value, value), {}, _features(row.value)))

    # Other operations

    def _moved(self, node: fx.Node, rows: Rows) -> Rows:
        """Rows in other dims, each as it was; or each row in another shape."""
        name = op_name(node)
        after = known_tensor(node).shape
        if name in ("permute", "transpose", "swapaxes"):
            return self._permuted(node, rows)
        if name in ("unsqueeze", "squeeze"):
            return self._unit(node, rows)
        if rows.unit:
            raise self._refused(node)
        features = _features(rows.value)
        for labels in (rows.labels, *self.shapes):
            sizes = [self.sizes[label] for label in labels]
            if len(after) > len(labels) and all(map(same_size, after, sizes)) and _regroups(rows.labels, labels):
                own = tuple(after[len(labels) :])
                if len(own) == len(features) and all(map(same_size, own, features)):
                    return Rows(labels, rows.value)
                return Rows(labels, self._emit(node, "reshape", "reshape", (rows.value, -1, *own), {}, own))
        raise self._refused(node)

    def _permuted(self, node: fx.Node, rows: Rows) -> Rows:
        rank = known_tensor(node).dim()
        dims = [normalized_dim(dim, rank) for dim in varargs(node, 1, "dims")]
        if op_name(node) != "permute":
            order = list(range(rank))
            order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
            dims = order
        count = len(rows.labels)
        if rows.unit or dims[count:] != list(range(count, rank)):
            raise self._refused(node)
        return Rows(tuple(rows.labels[dim] for dim in dims[:count]), rows.value)

    def _unit(self, node: fx.Node, rows: Rows) -> Rows:
        dim, before, after = arg(node, 1, "dim"), known_tensor(node.args[0]).dim(), known_tensor(node).dim()
        count, adds = len(rows.labels), op_name(node) == "unsqueeze"
        place = normalized_dim(dim, max(before, after)) if isinstance(dim, int) else -1
        unit = {count: "before", count + 1: "after"}.get(place, "")
        if len(_features(rows.value)) != 1 or not unit or rows.unit != ("" if adds else unit):
            raise self._refused(node)
        return Rows(rows.labels, rows.value, unit if adds else "")

    def _indexed(self, node: fx.Node, rows: Rows) -> Rows:
        """`rows[..., a:b]`, an item of `chunk`, and `rows[..., None]`."""
        index = node.args[1]
        if isinstance(rows.value, Op) and rows.value.name in ("chunk", "split") and fake_tensor(node.args[0]) is None:
            return Rows(rows.labels, self._emit_like(node, (rows.value, index), {}, rows.labels))
        count, rank = len(rows.labels), known_tensor(node.args[0]).dim()
        items = list(index) if isinstance(index, tuple) else [index]
        at = items.index(Ellipsis) if Ellipsis in items else len(items)
        kept = sum(item is not None and item is not Ellipsis for item in items)
        items[at : at + 1] = [slice(None)] * (rank - kept)
        if rows.unit or items[:count] != [slice(None)] * count or any(isinstance(item, fx.Node) for item in items):
            raise self._refused(node)
        own = tuple(items[count:])
        if own in ((slice(None), None), (None, slice(None))):
            return Rows(rows.labels, rows.value, "after" if own[1] is None else "before")
        return Rows(rows.labels, self._emit_like(node, (rows.value, (slice(None), *own)), {}, rows.labels))

    def _sum(self, node: fx.Node, rows: Rows) -> Seen:
        dim = arg(node, 1, "dim")
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        plain = set(node.kwargs) <= {"dim", "input"} and len(node.args) <= 2 and not rows.unit
        if not isinstance(dim, int) or not plain:
            raise self._refused(node)
        place = normalized_dim(dim, known_tensor(node.args[0]).dim())
        left = rows.labels[:place] + rows.labels[place + 1 :]
        if place >= len(rows.labels) or left != ("T",) or len(_features(rows.value)) != 1:
            raise Rejected("slots_of_a_token_are_summed", node, "not the sum over the experts of each token")
        return Total(rows.value)

    def _operation(self, node: fx.Node, name: str) -> Rows:
        """An operation on rows, each alone."""
        operands = [self.seen(operand) for operand in node.all_input_nodes]
        units = {operand.unit for operand in operands if isinstance(operand, Rows)}
        if units - {""}:
            return self._beside_unit(node, name, operands)
        labels = next((operand.labels for operand in operands if isinstance(operand, Rows)), None)
        labels = labels or self._repeated_labels(operands)
        if labels is None:
            raise self._refused(node)
        if name == "type_as":
            rows = self._operand(node.args[0], labels, known_tensor(node).dim())
            dtype = known_tensor(node).dtype
            return Rows(labels, self._emit(node, "to", "to", (rows, dtype), {}, _features(rows)))
        if name in POINTWISE:
            rank = known_tensor(node).dim()
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda operand: self._operand(operand, labels, rank))
            return Rows(labels, self._emit_like(node, args, kwargs, labels))
        if name in _ALONG_DIM:
            return Rows(labels, self._along_dim(node, _ALONG_DIM[name], labels))
        if name in NORMS and len(arg(node, 1, "normalized_shape")) == known_tensor(node).dim() - len(labels):
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda operand: self._operand(operand, labels, 0))
            return Rows(labels, self._emit_like(node, args, kwargs, labels))
        raise self._refused(node)

    def _beside_unit(self, node: fx.Node, name: str, operands: list[Seen | None]) -> Rows:
        """A pointwise operation on rows that all keep a dim of size one in the same place."""
        rows = [operand for operand in operands if isinstance(operand, Rows)]
        alike = {(row.labels, row.unit, len(_features(row.value))) for row in rows}
        if name not in POINTWISE or len(rows) != len(operands) or len(alike) != 1:
            raise self._refused(node)
        labels, unit, _ = alike.pop()
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda operand: self._operand(operand, labels, 0))
        sizes = _features(rows[0].value)
        return Rows(labels, self._emit(node, name, node.target, args, kwargs, sizes), unit)

    def _repeated_labels(self, operands: list[Seen | None]) -> Labels | None:
        return ("M",) if ("M",) in self.shapes and any(map(_repeats, operands)) else None

    def _operand(self, node: fx.Node, labels: Labels, rank: int) -> Any:
        """A tensor beside rows; `rank` dims are lined up, none where it is a parameter that has no rows."""
        seen = self.seen(node)
        if isinstance(seen, Rows):
            if seen.labels != labels:
                raise self._refused(node)
            return seen.value
        if fake_tensor(node) is None or (isinstance(seen, Input) and known_tensor(node).dim() <= rank - len(labels)):
            return self._leaf(Shared, node)
        lined_up = (
            seen.moved(lambda view: View(view.start, _padded(view.dims, rank), view.steps))
            if isinstance(seen, Input)
            else Input(())
        )
        value = self._resolve(lined_up, labels, Gathered, SlotGathered, PerExpert)
        if value is None:
            raise Rejected("body_is_row_wise", node, "a tensor stands beside rows that is not known to belong to them")
        return value

    def _along_dim(self, node: fx.Node, place: int, labels: Labels) -> Value:
        tensor = known_tensor(node.args[0])
        dim = arg(node, place, "dim")
        own = normalized_dim(dim, tensor.dim()) - len(labels) if isinstance(dim, int) else -1
        if own < 0:
            raise self._refused(node)
        operand = self._operand(node.args[0], labels, tensor.dim())
        kwargs = {key: value for key, value in node.kwargs.items() if key != "dim"} | {"dim": own + 1}
        return self._emit_like(node, (operand, *node.args[1:place]), kwargs, labels)

    def _emit_like(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Labels) -> Value:
        """The operation of `node` on one row dim."""
        count, result = len(labels), example(node)
        if isinstance(result, (tuple, list)):
            meta: Any = tuple(_empty(part, (self.sizes["N"], *part.shape[count:])) for part in result)
        else:
            meta = _empty(result, (self.sizes["N"], *result.shape[count:]))
        return self._op(node, op_name(node) or "", node.target, args, kwargs, meta)

    def _emit(self, node: fx.Node, name: str, target: Any, args: Any, kwargs: Any, sizes: tuple[Any, ...]) -> Value:
        return self._op(node, name, target, args, kwargs, _empty(known_tensor(node), (self.sizes["N"], *sizes)))

    def _op(self, node: fx.Node, name: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Value:
        kind = "call_method" if isinstance(target, str) else "call_function"
        own_args, own_kwargs = map_values((args, kwargs), lambda value: value.node)
        own = self._graph.create_node(kind, target, own_args, own_kwargs, name=node.name)
        own.meta = {key: node.meta[key] for key in _PLACE if key in node.meta} | {"example_value": meta}
        value = Op(name, own, args, kwargs, has_rows=True)
        self._values[own] = value
        return value

    def _written(self, node: fx.Node, found: Seen | None) -> Seen | None:
        """`found` after all writes to `node`, each of which adds an expert's parameter."""
        writes = inplace_users(node)
        if not writes or not isinstance(found, Rows):
            return found
        last = writes[-1]
        late = any(reader not in writes and reader < last for reader in node.users)
        if is_inplace(node) or late or any(write.users for write in writes[:-1]) or not _is_fresh(node):
            raise Rejected(
                "nothing_is_written_inside", last, f"`{op_name(last)}` writes to rows that are read elsewhere"
            )
        for write in writes:
            if op_name(write) not in ("add_", "iadd") or write.kwargs or found.unit:
                raise Rejected("nothing_is_written_inside", write, f"`{op_name(write)}` writes to the experts' rows")
            other = self._operand(write.args[1], found.labels, known_tensor(node).dim())
            if known_tensor(other.node).dtype != known_tensor(node).dtype:
                raise Rejected("nothing_is_written_inside", write, "a sum is rounded as it is written")
            value = self._op(write, "add", torch.add, (found.value, other), {}, _meta(found.value))
            found = Rows(found.labels, value)
            self.writes.add(write)
        return found

    def _refused(self, node: fx.Node) -> Rejected:
        return Rejected("body_is_row_wise", node, f"`{op_name(node)}` is not known to keep rows apart")


def picked_by(node: fx.Node) -> fx.Node | None:
    """The tensor that `node` indexes the first dim of another with."""
    name, index = op_name(node), None
    if name == "getitem":
        index = node.args[1][0] if isinstance(node.args[1], tuple) and node.args[1][1:] == (Ellipsis,) else node.args[1]
    elif name == "index_select" and arg(node, 1, "dim") == 0:
        index = arg(node, 2, "index")
    return index if isinstance(index, fx.Node) and fake_tensor(index) is not None else None


def index_labels(index: fx.Node, ids: fx.Node | None) -> Labels | None:
    """The dims in which `index` holds `ids`, which are [T, K] or flat."""
    dims = next((view.dims for view in views_of(index) if view.start is ids), None)
    return _INDEXED.get(dims or ())


_INDEXED: dict[tuple[Dim, ...], Labels] = {((0,), (1,)): ("T", "K"), ((0, 1),): ("N",), ((0,),): ("N",)}
_PLACE = ("stack_trace", "nn_module_stack", "source_fn_stack")


def _place(label: str, dim: Dim) -> dict[str, int | str] | None:
    """Which dims of its start a view has where rows are counted by `label`."""
    if dim == ():
        return {}
    if dim[0] == "p":
        return {"p": label} if dim[1] == label else None
    if len(dim) == 1 and label in ("T", "K", "E"):
        return {label: dim[0]}
    if label in ("N", "M"):
        if dim[0] == {"N": "r", "M": "t"}[label]:
            return {"T": dim[1]}
        if len(dim) == 1 and label == "N":
            return {"N": dim[0]}
        if len(dim) == 2 and isinstance(dim[0], int):
            return dict(zip(_PARTS[label], dim, strict=True))
    return None


def _regroups(before: Labels, after: Labels) -> bool:
    """Whether row-major order is the same."""
    return before == after or any({before, after} == {(whole,), parts} for whole, parts in _PARTS.items())


def _padded(dims: tuple[Dim, ...], count: int) -> tuple[Dim, ...]:
    return ((),) * (count - len(dims)) + tuple(dims)


def _as_matrices(view: View, rank: int, unit: str) -> View | None:
    """`view` in a product of `rank` dims, each matrix with its outputs first."""
    if len(view.dims) < 2:
        return None
    matrix = view.dims[-2:] if unit == "after" else view.dims[:-3:-1]
    return View(view.start, (*_padded(view.dims[:-2], rank - 2), *matrix), view.steps)


def _for_each_row(view: View) -> View:
    """`view`, whose matrices are multiplied with many rows each, which are counted by the dim before the vectors."""
    return View(view.start, (*view.dims[:-2], (), *view.dims[-2:]), view.steps)


def _reordered(view: View, letters: str, counted: str, rest: str) -> View:
    """`view` with its dims in the order of `counted` and `rest`; a letter that it lacks is a dim of size one."""
    dims = dict(zip(letters, view.dims, strict=True))
    return View(view.start, tuple(dims.get(letter, ()) for letter in counted + rest), view.steps)


def _repeats(seen: Seen | None) -> bool:
    """Whether `seen` is tokens, repeated for each expert."""
    return isinstance(seen, Input) and any(view.dims[:1] and view.dims[0][:1] == ("t",) for view in seen.views)


def _meta(value: Value) -> Any:
    return value.node.meta["example_value"]


def _features(value: Value) -> tuple[Any, ...]:
    return tuple(_meta(value).shape[1:])


def _empty(like: torch.Tensor, sizes: tuple[Any, ...]) -> torch.Tensor:
    mode = getattr(like, "fake_mode", None)
    assert mode is not None
    with mode:
        return torch.empty(sizes, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad)


def _is_fresh(node: fx.Node) -> bool:
    """Whether `node` holds memory that nothing else names: a product, or the only view of one."""
    while op_name(node) in ("squeeze", "view", "reshape") and len(node.all_input_nodes[0].users) == 1:
        node = node.all_input_nodes[0]
    return op_name(node) in ("bmm", "matmul", "einsum")
