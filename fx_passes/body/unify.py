"""The one body of all experts.

A loop over E experts that Dynamo unrolled holds E copies of the same computation. `unify` walks all of them at once and
keeps one: constants must be equal, operations the same, and where the copies differ it must be in an expert's own
parameter. A loop that was captured as one iteration over a symbolic expert is the case of a single copy.

E experts.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from fx_passes.body.entries import chosen_by
from fx_passes.body.gather import Taking, chain, takings
from fx_passes.body.parameter_views import viewed
from fx_passes.body.simplify import simplified
from fx_passes.body.stack_of_one import without_stack
from fx_passes.body.values import Body, Gathered, Op, PerExpert, Shared, SlotGathered, Value, has_rows, nested_values
from fx_passes.body.view_steps import has_expert
from fx_passes.facts import counts_behind, fact
from fx_passes.facts.ids import is_single_choice
from fx_passes.facts.statements import Fact, Mask, Rows
from fx_passes.graph.aliasing import has_own_memory, made_by, writes_before_reads
from fx_passes.graph.markers import Expert, ask_for_number, expert_of, expert_parameter, place_among_hits, select_expert
from fx_passes.graph.ops import (
    OF_PARAMETERS,
    POINTWISE,
    by_position,
    fake_tensor,
    is_cast_alike,
    is_inplace,
    known_tensor,
    op_name,
    out_of_place,
    same_size,
)
from fx_passes.graph.said import said_of, said_of_call


class NotIsomorphic(Exception):
    """Two experts compute different things."""

    def __init__(self, node: fx.Node | None, detail: str) -> None:
        super().__init__(detail)
        self.node = node
        self.detail = detail


class UnknownOperation(Exception):
    """An expert does something that no rule speaks of: a higher-order op, a custom op, a hook."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(said_of_call(node))
        self.node = node


def unify(copies: Sequence[fx.Node], masks: Sequence[Mask]) -> Body:
    """The one body that all `copies` are instances of; copy i is computed on the slots of `masks[i]`.

    Raises:
        NotIsomorphic: if two copies compute different things.
        UnknownOperation: at an operation without a name.
    """
    walk = Unifier(tuple(masks))
    root = walk.value(tuple(copies))
    return Body(root, tuple(walk.values), walk.nodes(), frozenset(walk.writes))


class Unifier:
    """Walks all copies at once; copy i is computed by `experts[i]`, on the slots of `masks[i]` where it has any."""

    def __init__(self, masks: tuple[Mask, ...], experts: tuple[Expert, ...] = ()) -> None:
        self.masks = masks
        self.experts = experts or tuple(mask.expert for mask in masks)
        self.values: list[Value] = []
        self.writes: set[fx.Node] = set()
        self.memo: dict[tuple[fx.Node, ...], Value] = {}
        self._inner: dict[fx.Node, bool] = {}
        self._taken: set[fx.Node] = set()

    def value(self, nodes: tuple[fx.Node, ...]) -> Value:
        if nodes not in self.memo:
            value = self._derive(nodes)
            self.memo[nodes] = value
            self.values.append(value)
            self.memo[nodes] = self._written(nodes, value)
        return self.memo[nodes]

    def nodes(self) -> frozenset[fx.Node]:
        """All nodes of all copies, save what comes from outside the loop."""
        own = (nodes for nodes, value in self.memo.items() if not isinstance(value, Shared))
        return frozenset(self._taken.union(self.writes, *own))

    def _derive(self, nodes: tuple[fx.Node, ...]) -> Value:
        first = nodes[0]
        if first.target is expert_parameter and len(nodes) == 1:
            parameters = first.args[0]
            are_stacked = isinstance(parameters, fx.Node)
            return PerExpert(first, stacked=parameters) if are_stacked else PerExpert(first, tensors=tuple(parameters))
        if all(map(is_inplace, nodes)):
            written = self.value(tuple(node.all_input_nodes[0] for node in nodes))
            if self.writes.issuperset(nodes):
                return written
        gathered = self._gathered(nodes)
        if gathered is not None:
            return gathered
        parameter = self._parameter(nodes)
        if parameter is not None:
            return parameter
        if not self._is_inner(first) and all(node is first for node in nodes):
            return Shared(first)
        view = self._view_of_parameter(nodes)
        if view is not None:
            return view
        if all(node.op in ("placeholder", "get_attr") for node in nodes):
            return PerExpert(first, tensors=self._one_an_expert(nodes))
        if isinstance(fact(first), Mask) and len(nodes) > 1:
            raise NotIsomorphic(
                first, "a mask of an expert does more than to pick the rows and the weights of its tokens"
            )
        return self._operation(nodes)

    def _written(self, nodes: tuple[fx.Node, ...], value: Value) -> Value:
        """`value` once each expert has written to it, where nobody else reads it before: `h *= a; h.relu_()`."""
        writes = [writes_before_reads(node) if has_own_memory(made_by(node)) else [] for node in nodes]
        if not writes[0] or any(len(own) != len(writes[0]) for own in writes):
            return value
        names = [(write.op, write.target, out_of_place(write)) for write in writes[0]]
        if any([(write.op, write.target, out_of_place(write)) for write in own] != names for own in writes):
            return value
        if any(name not in POINTWISE for _, _, name in names) or any("out" in write.kwargs for write in writes[0]):
            return value
        for same, (_, _, name) in zip(zip(*writes, strict=True), names, strict=True):
            operands = self._structure(tuple(write.args[1:] for write in same), same[0])
            options = self._structure(tuple(dict(write.kwargs) for write in same), same[0])
            value = Op(str(name), same[0], (value, *operands), options, has_rows=True)
            self.writes.update(same)
            self.values.append(value)
        return value

    def _one_an_expert(self, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Parameters by expert; an expert that has a copy for each slot must use the same one in all of them."""
        parameters: dict[Expert, fx.Node] = {}
        for node, expert in zip(nodes, self.experts, strict=True):
            if parameters.setdefault(expert, node) is not node:
                raise NotIsomorphic(node, "an expert uses another parameter in another slot")
        if len(set(parameters.values())) != len(parameters):
            raise NotIsomorphic(nodes[0], "some experts share a parameter and others do not")
        return tuple(parameters.values())

    def _operation(self, nodes: tuple[fx.Node, ...]) -> Value:
        first = nodes[0]
        for node in nodes:
            if node.op != first.op or node.target != first.target:
                raise NotIsomorphic(node, f"one expert computes {_show(first)}, another {_show(node)}")
        if counts_behind(first) is not None:
            raise NotIsomorphic(first, "an expert's number of tokens is used as a value")
        if op_name(first) is None:
            raise UnknownOperation(first)
        name, operands = op_name(first) or "", [node.args for node in nodes]
        if all(map(is_cast_alike, nodes)):
            name, operands = "to", [(node.args[0], known_tensor(node).dtype) for node in nodes]
        args = self._structure(tuple(operands), first)
        kwargs = self._structure(tuple(dict(node.kwargs) for node in nodes), first)
        rows = any(has_rows(value) for value in nested_values((args, kwargs)))
        value = without_stack(Op(name, first, *by_position(name, args, kwargs), rows))
        value = simplified(value) if isinstance(value, Op) else value
        return self._computed(nodes, value) if isinstance(value, Op) and not rows else value

    def _computed(self, nodes: tuple[fx.Node, ...], op: Op) -> Value:
        """`W[e] + B[e] @ A[e]`: what every expert computes alike of its parameters is a parameter, too.

        It stays where it is computed, once for each expert: neither for each of its slots, nor once for all experts.
        """
        operands = list(nested_values((op.args, op.kwargs)))
        is_pure = op.name in OF_PARAMETERS and fake_tensor(op.node) is not None and not any(map(is_inplace, nodes))
        is_own = any(isinstance(operand, PerExpert) for operand in operands)
        alone = all(isinstance(operand, (PerExpert, Shared)) for operand in operands)
        once_each = len(set(self.experts)) == len(nodes)
        if not (is_pure and is_own and alone and once_each):
            return op
        if all(isinstance(expert, int) for expert in self.experts):
            return PerExpert(op.node, tensors=nodes)
        for expert in self.experts:
            ask_for_number(expert)
        return op

    def _structure(self, items: tuple[Any, ...], at: fx.Node) -> Any:
        """The same place of an argument list in all copies."""
        first = items[0]
        if any(type(item) is not type(first) for item in items):
            raise NotIsomorphic(at, f"an argument of {_show(at)} differs in kind between experts")
        if isinstance(first, fx.Node):
            return self.value(items)
        if isinstance(first, slice):
            return slice(*self._structure(tuple((item.start, item.stop, item.step) for item in items), at))
        if isinstance(first, (tuple, list)):
            if any(len(item) != len(first) for item in items):
                raise NotIsomorphic(at, f"an argument of {_show(at)} differs in length between experts")
            return type(first)(self._structure(tuple(item[place] for item in items), at) for place in range(len(first)))
        if isinstance(first, dict):
            if any(item.keys() != first.keys() for item in items):
                raise NotIsomorphic(at, f"the keyword arguments of {_show(at)} differ between experts")
            return {key: self._structure(tuple(item[key] for item in items), at) for key in first}
        if any(item != first for item in items):
            raise NotIsomorphic(
                at, f"a constant of {_show(at)} differs between experts: {sorted(set(map(str, items)))}"
            )
        return first

    def _gathered(self, nodes: tuple[fx.Node, ...]) -> Gathered | SlotGathered | None:
        """The same rows of one tensor from outside in all copies: of those that fit, the tensor farthest back."""
        first = nodes[0]
        ways = [takings(node, mask) for node, mask in zip(nodes, self.masks, strict=True)]
        for steps in sorted(ways[0], reverse=True):
            taking = ways[0][steps]
            if self._is_inner(taking.source) or any(way.get(steps) != taking for way in ways):
                continue
            value = _taken(taking, first, is_single_choice(self.masks[0].ids))
            if value is not None:
                self._taken.update(step for node in nodes for step in chain(node, steps))
                return value
        return None

    def _parameter(self, nodes: tuple[fx.Node, ...]) -> PerExpert | None:
        """`stacked[e]`, with `stacked` from outside the loop."""
        found = chosen_by(nodes, self.experts)
        if found is None or self._is_inner(found.source) or fact(found.source) is not None:
            return None
        self._taken |= found.nodes
        return PerExpert(nodes[0], stacked=found.source, leading=found.leading, steps=found.steps)

    def _view_of_parameter(self, nodes: tuple[fx.Node, ...]) -> PerExpert | None:
        """`stacked[e][:F]`, `w.chunk(2)[0]`, `w.t()`."""
        first, *others = map(viewed, nodes)
        if first is None or has_expert(first.step) or any(o is None or o.step != first.step for o in others):
            return None
        operand = self.value((first.operand, *(other.operand for other in others if other is not None)))
        value = operand.after(first.step, nodes[0]) if isinstance(operand, PerExpert) else None
        if value is not None:
            self._taken.update(node.args[0] for node in nodes if fake_tensor(node.args[0]) is None)
        return value

    def _is_about_an_expert(self, known: Fact | None) -> bool:
        """Whether `known` is a mask of one of the loop's experts, or the positions of its rows."""
        mask = known.mask if isinstance(known, Rows) else known
        if not isinstance(mask, Mask) or not self.masks:
            return isinstance(mask, Mask)
        return mask.ids is self.masks[0].ids and mask.expert in self.experts

    def _is_inner(self, node: fx.Node) -> bool:
        """Whether `node` depends on an expert or on its rows."""
        if node not in self._inner:
            self._inner[node] = False
            by_expert = expert_of(node) is not None or node.target in (
                select_expert,
                expert_parameter,
                place_among_hits,
            )
            inner = by_expert or self._is_about_an_expert(fact(node))
            self._inner[node] = inner or any(self._is_inner(source) for source in node.all_input_nodes)
        return self._inner[node]


def _taken(taking: Taking, node: fx.Node, is_single: bool) -> Gathered | SlotGathered | None:
    leading, rest = taking.dims.index("R"), taking.dims[taking.dims.index("R") + 1 :]
    if taking.column:
        is_value = not leading and set(rest) <= {"1"}
        return SlotGathered(taking.source, node, len(rest), table=taking.column == "E") if is_value else None
    is_vector = all(same_size(size, 1) for size in known_tensor(node).shape[leading + 1 :])
    if is_single and is_vector and not leading:
        return SlotGathered(taking.source, node, len(rest))
    return Gathered(taking.source, node, leading) if leading <= 1 and "1" not in rest else None


def _show(node: fx.Node) -> str:
    name = op_name(node) or getattr(node.target, "__name__", None)
    return f"`{name}`" if name is not None else said_of(node)
