"""The expert body of code that works on all slots at once, sorted by expert: the same values as of a loop.

    x[order // K]                       Gathered
    weights.reshape(-1)[order]          SlotGathered
    gates[tokens].gather(1, experts)    SlotGathered, of a table
    bias[experts]                       PerExpert: the row of its expert, for each slot
    grouped_mm(rows, W, offs=offsets)   Op("linear") with an expert's own W
    expert_cat(parts, counts)           the body of `parts`, which read segments of rows

Rows whose expert is num_experts or more (sentinels of expert parallelism) are nobody's: filling them with zeros changes
nothing that counts. Writes to fresh tensors are followed where everybody else reads later. K experts per token.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fx_passes.body.segment_body import segment_body
from fx_passes.body.values import (
    Body,
    Gathered,
    Op,
    PerExpert,
    Shared,
    SlotGathered,
    Value,
    has_rows,
    map_values,
    nested_values,
    rank,
)
from fx_passes.facts import fact
from fx_passes.facts.gate_slots import EXPERTS, gate_slots
from fx_passes.facts.slots import Absent, Experts, Flat, Offsets, Order, Tokens, slot_fact
from fx_passes.facts.statements import Counts
from fx_passes.graph.aliasing import inplace_users, is_read_before
from fx_passes.graph.markers import expert_cat
from fx_passes.graph.ops import (
    POINTWISE,
    arg,
    attribute,
    casts_nothing,
    fake_tensor,
    is_inplace,
    normalized_dim,
    op_name,
    same_size,
    squeezes_nothing,
    varargs,
)
from fx_passes.graph.row_index import have_one_width, repeated
from fx_passes.graph.said import said_of, said_of_call
from fx_passes.region import Rejected


@dataclass(frozen=True)
class SlotBody:
    """`writes` are the writes that `body` has followed; `fills_absent` says whether it fills the rows of sentinels.

    `segments` are the nodes in which the experts' segments are put together.
    """

    body: Body
    num_experts: int
    writes: frozenset[fx.Node]
    fills_absent: bool
    segments: tuple[fx.Node, ...]


def translate(root: fx.Node, order: Order, inner: frozenset[fx.Node]) -> SlotBody:
    """The body that computes `root`, whose rows are the slots in `order`; `inner` are the nodes that depend on it.

    Raises:
        Rejected: where `root` is computed in another way than slot by slot, each with its own expert.
    """
    walk = _Translator(order, inner)
    value = walk.value(root)
    if len(walk.expert_counts) != 1:
        raise Rejected("every_expert_is_covered", root, f"grouped products over {sorted(walk.expert_counts)} experts")
    (num_experts,) = walk.expert_counts
    if any(number != num_experts for number in walk.absent_from):
        raise Rejected("every_expert_is_covered", root, "rows are filled that belong to an expert")
    if walk.absent_from and not walk.vanishes(root):
        raise Rejected("rows_of_nobody_are_zero", root, "rows without an expert add something to the output")
    body = Body(value, tuple(walk.values), frozenset(walk.nodes))
    return SlotBody(body, num_experts, frozenset(walk.writes), bool(walk.absent_from), tuple(walk.segments))


class _Translator:
    def __init__(self, order: Order, inner: frozenset[fx.Node]) -> None:
        self.order = order
        self.inner = inner
        self.values: list[Value] = []
        self.writes: list[fx.Node] = []
        self.nodes: set[fx.Node] = set()
        self.expert_counts: set[int] = set()
        self.absent_from: set[int] = set()
        self.segments: list[fx.Node] = []
        self._memo: dict[fx.Node, Value] = {}

    def value(self, node: fx.Node) -> Value:
        """What `node` holds once all is written to it."""
        if node not in self._memo:
            value = self._written(node, self._derive(node))
            self._memo[node] = value
            if not isinstance(value, Shared):
                self.nodes.add(node)
            if value not in self.values:
                self.values.append(value)
        return self._memo[node]

    def vanishes(self, node: fx.Node) -> bool:
        """Whether the rows of sentinels are zero in `node`."""
        name = op_name(node)
        if name in ("masked_fill", "masked_fill_") and self._fills_absent(node):
            return True
        operands = node.all_input_nodes
        if name in ("mul", "multiply"):
            return any(self.vanishes(operand) for operand in operands)
        return name in ("to", "float") and self.vanishes(operands[0])

    def _derive(self, node: fx.Node) -> Value:
        name = op_name(node)
        if node not in self.inner:
            return Shared(node)
        if is_inplace(node):
            return self.value(node.all_input_nodes[0])
        if name == "grouped_mm":
            return self._grouped_linear(node)
        if node.target is expert_cat:
            return self._segments(node)
        gathered = self._gathered(node) if name in ("getitem", "index_select", "gather") else None
        if gathered is not None:
            return gathered
        if name == "masked_fill" and self._fills_absent(node):
            return self.value(node.args[0])
        if (name == "to" and casts_nothing(node)) or squeezes_nothing(node):
            return self.value(node.args[0])
        if name is None:
            raise Rejected("operations_are_known", node, said_of_call(node))
        return self._operation(node, name)

    def _operation(self, node: fx.Node, name: str) -> Value:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self.value)
        operands = list(nested_values((args, kwargs)))
        for operand in operands:
            if isinstance(operand, PerExpert) and (name not in POINTWISE or _dims(node) != 1 + len(operand.shape)):
                raise Rejected("body_is_row_wise", node, f"`{name}` of experts' parameters that were gathered by slot")
        return Op(name, node, args, kwargs, any(map(has_rows, operands)))

    def _gathered(self, node: fx.Node) -> Value | None:
        """`source[index]` with an index over slots; None with any other index."""
        if op_name(node) == "gather":
            return self._gathered_rows(node) or self._gathered_gates(node)
        source, index = node.args[0], arg(node, 1, "index")
        if index == (slice(None), None):
            value = self.value(source)
            is_vector = isinstance(value, SlotGathered) and value.trailing == 0
            return replace(value, trailing=1, node=node) if is_vector else None
        if _is_all_rows(node):
            return self.value(source)
        if op_name(node) == "index_select":
            source, dim, index = (arg(node, at, key) for at, key in enumerate(("input", "dim", "index")))
            if dim != 0:
                return None
        known = slot_fact(index)
        if known is None:
            return None
        if source in self.inner:
            raise Rejected("rows_are_taken_in_one_order", node, "rows that were sorted are taken in another order")
        if known == Tokens(self.order):
            return Gathered(source, node)
        flat = slot_fact(source)
        if known == self.order and isinstance(flat, Flat):
            self.nodes.add(source)
            return SlotGathered(flat.source, node, trailing=0)
        if known == Experts(self.order):
            return PerExpert(source, stacked=source)
        raise Rejected("rows_are_taken_in_one_order", node, f"{said_of(node)} is not in the order of the experts' rows")

    def _gathered_rows(self, node: fx.Node) -> Value | None:
        """`x.gather(0, tokens[:, None].expand(-1, D))`."""
        source, dim, index = (arg(node, at, key) for at, key in enumerate(("input", "dim", "index")))
        tokens = repeated(index, is_tokens) if dim == 0 and have_one_width(source, index) else None
        own = tokens is not None and slot_fact(tokens) == Tokens(self.order) and source not in self.inner
        return Gathered(source, node) if own else None

    def _gathered_gates(self, node: fx.Node) -> Value | None:
        """`gates[tokens].gather(1, experts[:, None])`."""
        rows, dim, index = (arg(node, at, key) for at, key in enumerate(("input", "dim", "index")))
        experts, is_row = gate_slots(index), op_name(rows) == "getitem" and slot_fact(rows.args[1]) is not None
        if dim not in (1, -1) or not is_row or slot_fact(rows.args[1]) != Tokens(self.order) or experts is None:
            return None
        if experts.kind != EXPERTS or experts.sort is not self.order.sort or _dims(index) != 2:
            return None
        self.nodes.add(rows)
        return SlotGathered(rows.args[0], node, trailing=1, table=True)

    def _segments(self, node: fx.Node) -> Value:
        """The body of the experts' copies, on all rows that they read segments of."""
        parts, counts = node.args
        known = fact(counts)
        if not isinstance(parts, (list, tuple)) or not isinstance(known, Counts) or known.ids is not self.order.ids:
            raise Rejected("offsets_are_those_of_the_rows", node, "segments of rows that were sorted by other ids")
        body = segment_body(tuple(parts), known)
        self.segments.append(node)
        self.expert_counts.add(known.num_classes)
        self.nodes |= body.nodes
        self.writes += body.writes
        return self._on_all_rows(body.root, {})

    def _on_all_rows(self, value: Value, done: dict[Value, Value]) -> Value:
        if value not in done:
            if isinstance(value, (Gathered, SlotGathered)):
                done[value] = self.value(value.source)
            elif isinstance(value, Op):
                args, kwargs = map_values((value.args, value.kwargs), lambda child: self._on_all_rows(child, done))
                done[value] = replace(value, args=args, kwargs=kwargs)
            else:
                done[value] = value
            self.values.append(done[value])
        return done[value]

    def _grouped_linear(self, node: fx.Node) -> Value:
        known = slot_fact(arg(node, 2, "offs"))
        if not isinstance(known, Offsets) or known.order != self.order:
            raise Rejected(
                "offsets_are_those_of_the_rows", node, "the offsets are not proven to be those of the sorted ids"
            )
        options = [name for name, value in node.kwargs.items() if name != "offs" and value is not None]
        if options or len(node.args) not in (2, 3):
            raise Rejected("operations_are_known", node, "grouped_mm with a bias or an output dtype")
        rows, weight = node.args[:2]
        self.expert_counts.add(known.num_experts)
        parameter = _stacked(weight)
        if parameter is None or weight in self.inner:
            raise Rejected("experts_have_their_own_parameters", node, "grouped_mm of weights that are not [E, in, out]")
        self.values.append(parameter)
        if parameter.stacked is not weight:
            self.nodes.add(weight)
        return Op("linear", node, (self.value(rows), parameter), {}, has_rows=True)

    def _fills_absent(self, node: fx.Node) -> bool:
        """`masked_fill(rows, absent, 0)`, with one mask value a row."""
        _, mask, value = (arg(node, at, name) for at, name in enumerate(("input", "mask", "value")))
        known, rows, shape = slot_fact(mask), fake_tensor(node), fake_tensor(mask)
        if not isinstance(known, Absent) or known.order != self.order or value != 0 or rows is None or shape is None:
            return False
        self.absent_from.add(known.num_experts)
        return rows.dim() == shape.dim() and all(size == 1 for size in shape.shape[1:])

    def _written(self, node: fx.Node, value: Value) -> Value:
        """`value` after all writes to `node`."""
        writes = inplace_users(node)
        if not writes or node not in self.inner:
            return value
        if is_inplace(node) or not isinstance(value, (Gathered, Op)) or not _is_fresh(node):
            raise Rejected("nothing_is_written_inside", writes[0], f"`{op_name(writes[0])}` writes to {said_of(node)}")
        if is_read_before(node, writes):
            raise Rejected("nothing_is_written_inside", writes[-1], f"{said_of(node)} is written after it was read")
        for write in writes:
            value = self._after(write, value)
            self.writes.append(write)
        return value

    def _after(self, write: fx.Node, value: Value) -> Value:
        if op_name(write) == "masked_fill_" and self._fills_absent(write):
            return value
        is_linear = isinstance(value, Op) and value.name == "linear" and len(value.args) == 2
        if op_name(write) == "add_" and is_linear and len(write.args) == 2 and not write.kwargs:
            bias = self.value(write.args[1]) if isinstance(write.args[1], fx.Node) else None
            if isinstance(bias, PerExpert) and rank(bias) == 1:
                return Op("linear", write, (*value.args, bias), {}, has_rows=True)
        raise Rejected("nothing_is_written_inside", write, f"`{op_name(write)}` writes to the experts' rows")


def _is_all_rows(node: fx.Node) -> bool:
    """`rows[:N]` with N the number of rows."""
    index, before, after = arg(node, 1, "index"), fake_tensor(node.args[0]), fake_tensor(node)
    if not isinstance(index, slice) or index.start not in (None, 0) or index.step not in (None, 1):
        return False
    return before is not None and after is not None and same_size(before.shape[0], after.shape[0])


def is_tokens(node: fx.Node) -> bool:
    return isinstance(slot_fact(node), Tokens)


def _dims(node: fx.Node) -> int | None:
    tensor = fake_tensor(node)
    return tensor.dim() if tensor is not None else None


def _stacked(weight: Any) -> PerExpert | None:
    """Weights [E, in, out] of a grouped product. `linear` reads [E, out, in]: they are that, transposed."""
    tensor = fake_tensor(weight)
    if tensor is None or tensor.dim() != 3:
        return None
    if _swaps_last_dims(weight):
        return PerExpert(weight.args[0], stacked=weight.args[0])
    return PerExpert(weight, stacked=weight, transposed=True)


def _swaps_last_dims(node: fx.Node) -> bool:
    name = op_name(node)
    if name in ("transpose", "swapaxes", "swapdims"):
        return {normalized_dim(dim, 3) for dim in varargs(node, 1, "dims")} == {1, 2}
    if name == "permute":
        return tuple(normalized_dim(dim, 3) for dim in varargs(node, 1, "dims")) == (0, 2, 1)
    return attribute(node) == "mT"


def _is_fresh(node: fx.Node) -> bool:
    """Whether `node` holds memory of its own: a product, or rows taken by an index tensor."""
    return op_name(node) == "grouped_mm" or slot_fact(arg(node, 1, "index")) is not None
