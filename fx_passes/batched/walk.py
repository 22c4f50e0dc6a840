"""From node to node through code that keeps pairs of tokens and experts in dims of their own."""

from typing import Any

import torch
from torch import fx

from fx_passes.batched.einsum import einsum, equation_of
from fx_passes.batched.inputs import gathered, is_gathered, repeats_tokens
from fx_passes.batched.moves import MOVES, moved
from fx_passes.batched.operations import ALONG_DIM, beside_rows, operation
from fx_passes.batched.products import product
from fx_passes.batched.row_graph import RowGraph, features_of
from fx_passes.batched.rows import Input, Labels, Rows, Seen
from fx_passes.batched.totals import ADDITIONS, added_up, summed
from fx_passes.body.values import Body, SlotGathered, Value, children
from fx_passes.graph.aliasing import inplace_users, is_read_before
from fx_passes.graph.ops import arg, fake_tensor, is_inplace, known_tensor, op_name
from fx_passes.graph.said import said_of_call
from fx_passes.graph.views import step, views_of
from fx_passes.region import Rejected

_MATRIX_PRODUCTS = frozenset(("bmm", "matmul"))
_RESHAPES = MOVES - {"getitem"}


class Walk:
    """Walks the nodes `inner`. `shapes`, SLOTS or PAIRS, are the dims in which rows may stand, `sizes` their sizes.

    `ids` are the experts of the slots. `writes` are the writes that were followed.
    """

    def __init__(
        self,
        inner: frozenset[fx.Node],
        shapes: tuple[Labels, ...],
        sizes: dict[str, int | torch.SymInt],
        ids: fx.Node | None = None,
    ) -> None:
        self.inner, self.ids = inner, ids
        self.writes: set[fx.Node] = set()
        self._graph = RowGraph(shapes, sizes)
        self._seen: dict[fx.Node, Seen | None] = {}

    @property
    def steps(self) -> set[fx.Node]:
        """The nodes that brought inputs into shape."""
        return self._graph.steps

    @property
    def tables(self) -> list[SlotGathered]:
        """The tables of weights, an entry for each pair, that rows were seen to meet."""
        return [leaf for leaf in self._graph.leaves if isinstance(leaf, SlotGathered) and leaf.table]

    def body(self, root: Value) -> Body:
        """The body of which `root` is the result."""
        values, stack = [], [root]
        while stack:
            value = stack.pop()
            if value not in values:
                values.append(value)
                stack.extend(children(value))
        rows = {node for node, seen in self._seen.items() if isinstance(seen, Rows)}
        return Body(root, tuple(values), frozenset(rows | self.steps))

    def seen(self, node: Any) -> Seen | None:
        """What `node` is once all is written to it; None where it is no tensor."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._seen:
            known = node in self.inner or is_gathered(node, self.ids) or self._weighs_repeated_tokens(node)
            found = self._derive(node) if known else Input(views_of(node))
            self._seen[node] = found
            self._seen[node] = self._written(node, found)
        return self._seen[node]

    def _derive(self, node: fx.Node) -> Seen | None:
        name = op_name(node)
        if fake_tensor(node) is None and name not in ALONG_DIM:
            return None
        if name is None:
            raise Rejected("operations_are_known", node, said_of_call(node))
        if is_inplace(node) and name in ("add_", "iadd"):
            return self.seen(node.args[0])
        if name in _MATRIX_PRODUCTS:
            return product(self._graph, node, self.seen(node.args[0]), self.seen(arg(node, 1, "mat2")))
        if name == "einsum":
            equation, operands = equation_of(node)
            return einsum(self._graph, node, equation, *map(self.seen, operands))
        if name in ADDITIONS:
            return added_up(self._graph, node, self.seen)
        source = self.seen(arg(node, 0, "input"))
        if isinstance(source, Input):
            views = gathered(node, source, self.ids) or source.moved(lambda view: step(node, view))
            if views.views:
                return views
        if isinstance(source, Rows) and name in MOVES:
            return moved(self._graph, node, source)
        if isinstance(source, Rows) and name == "sum":
            return summed(node, source)
        return operation(self._graph, node, name, self.seen)

    def _weighs_repeated_tokens(self, node: fx.Node) -> bool:
        """`x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)`, in front of all experts."""
        name, source = op_name(node), arg(node, 0, "input")
        if name in _RESHAPES and isinstance(source, fx.Node):
            return self._weighs_repeated_tokens(source)
        if name not in ("mul", "multiply") or ("M",) not in self._graph.shapes:
            return False
        return any(repeats_tokens(Input(views_of(operand))) for operand in node.all_input_nodes)

    def _written(self, node: fx.Node, found: Seen | None) -> Seen | None:
        """`found` after all writes to `node`, each of which adds an expert's parameter."""
        writes = inplace_users(node)
        if not writes or not isinstance(found, Rows):
            return found
        if is_inplace(node) or is_read_before(node, writes) or not _is_fresh(node):
            detail = f"`{op_name(writes[-1])}` writes to rows that are read elsewhere"
            raise Rejected("nothing_is_written_inside", writes[-1], detail)
        for write in writes:
            found = self._after(write, node, found)
            self.writes.add(write)
        return found

    def _after(self, write: fx.Node, node: fx.Node, rows: Rows) -> Rows:
        is_sum = op_name(write) in ("add_", "iadd") and not write.kwargs and isinstance(write.args[1], fx.Node)
        if not is_sum or rows.unit:
            raise Rejected("nothing_is_written_inside", write, f"`{op_name(write)}` writes to the experts' rows")
        addend, result = write.args[1], known_tensor(node)
        other = beside_rows(self._graph, addend, self.seen(addend), rows.labels, result.dim())
        if known_tensor(other.node).dtype != result.dtype:
            raise Rejected("nothing_is_written_inside", write, "a sum is rounded as it is written")
        value = self._graph.op(write, "add", torch.add, (rows.value, other), {}, features_of(rows.value))
        return Rows(rows.labels, value)


def _is_fresh(node: fx.Node) -> bool:
    """Whether `node` holds memory that nothing else names: a product, or the only view of one."""
    while op_name(node) in ("squeeze", "view", "reshape") and len(node.all_input_nodes[0].users) == 1:
        node = node.all_input_nodes[0]
    return op_name(node) in _MATRIX_PRODUCTS | {"einsum"}
