"""A product of rows that were copied to lie expert by expert reads them where they are, and writes them where they go.

    y = parallel_linear(x[order // K], ...)         # or slots[order]
    slots = zeros.index_add(0, order, y)

`order` is a sort of the ids that the product's rows are routed by. Either line may stand alone. T tokens, K experts per
token, N = T * K slots.
"""

from dataclasses import dataclass

import torch
from torch import fx

from fx_passes.capture import events_of
from fx_passes.facts.slots import Order, Tokens, order_of, slot_fact
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import ZEROS, arg, draws_random, known_tensor, op_name, same_size, same_sizes, written
from fx_passes.rewriting.loop_invariant import mark_as_ours

ops = torch.ops.scatter_moe


@dataclass(frozen=True)
class _Copy:
    """Row i of the copy is row `order[i] // top_k` of `source`, or the other way round. order_N holds `order`."""

    source: fx.Node
    order: Order
    order_N: fx.Node
    top_k: int


def put_products_in_place(graph: fx.Graph) -> bool:
    """Whether there were any."""
    products = [node for node in graph.nodes if node.target is ops.parallel_linear.default]
    found = [_put_in_place(node) for node in products if node.args[4:7] == (1, True, True)]
    return any(found)


def _put_in_place(product: fx.Node) -> bool:
    rows, weight, order_N, offsets_E, _, _, _, *rest = product.args
    taken, put_back = _taken(rows, product), _put_back(product)
    if taken is not None and put_back is not None and taken.order != put_back.order:
        put_back = None
    copy = taken or put_back
    if copy is None or copy.order.ids is not _routed_ids(offsets_E):
        return False
    with product.graph.inserting_before(product):
        in_int32 = product.graph.call_method("int", (copy.order_N,))
    mark_as_ours(in_int32)
    in_int32.meta.update({key: product.meta[key] for key in ("stack_trace", "nn_module_stack") if key in product.meta})
    source, top_k = (rows, 1) if taken is None else (taken.source, taken.top_k)
    product.args = (source, weight, in_int32, offsets_E, top_k, taken is None, put_back is None, *rest)
    if put_back is not None:
        put_back.source.replace_all_uses_with(product)
        _erase_unused(put_back.source)
    _erase_unused(rows)
    _erase_unused(order_N)
    return True


def _routed_ids(offsets_E: fx.Node) -> fx.Node | None:
    """The ids whose experts' rows end at these offsets."""
    routed = arg(offsets_E, 0, "input") if op_name(offsets_E) == "getitem" else None
    if not isinstance(routed, fx.Node) or routed.target is not ops.route.default or offsets_E.args[1] != 1:
        return None
    return arg(routed, 0, "topk_ids")


def _taken(rows: fx.Node, product: fx.Node) -> _Copy | None:
    """Which rows `rows` are copies of, if nobody else reads them."""
    is_select = op_name(rows) == "index_select"
    if not (is_select or op_name(rows) == "getitem") or set(rows.users) != {product}:
        return None
    source, index = arg(rows, 0, "input"), arg(rows, 2 if is_select else 1, "index")
    known = slot_fact(index)
    if not isinstance(known, Order | Tokens) or (is_select and arg(rows, 1, "dim") != 0):
        return None
    by_slot = isinstance(known, Order)
    order_N = index if by_slot else arg(index, 0, "input")
    top_k = 1 if by_slot else known_tensor(known.order.ids).shape[1]
    before, after = known_tensor(source), known_tensor(rows)
    if before.dim() != 2 or not same_size(before.shape[0] * top_k, after.shape[0]):
        return None
    # The copy may be cut off from the tensor's history, or be older than what the tensor holds now.
    is_older = any(writer > rows for writer in writers_of(source))
    if is_older or _is_written(index) or _is_written(order_N) or before.requires_grad != after.requires_grad:
        return None
    return _Copy(source, order_of(known), order_N, int(top_k))


def _put_back(product: fx.Node) -> _Copy | None:
    """The tensor of zeros to which an order of slots adds the product's rows, if nothing else becomes of them."""
    node = next(iter(product.users), None)
    if node is None or len(product.users) != 1 or op_name(node) != "index_add" or arg(node, 1, "dim") != 0:
        return None
    zeros, order_N, rows = arg(node, 0, "input"), arg(node, 2, "index"), arg(node, 3, "source")
    known = slot_fact(order_N)
    if rows is not product or op_name(zeros) not in ZEROS or arg(node, 4, "alpha", 1) != 1:
        return None
    if not isinstance(known, Order) or _is_written(order_N) or _is_written(zeros):
        return None
    before, after = known_tensor(product), known_tensor(node)
    alike = before.dtype == after.dtype and before.requires_grad == after.requires_grad
    return _Copy(node, known, order_N, 1) if alike and same_sizes(before.shape, after.shape) else None


def _is_written(node: fx.Node) -> bool:
    return any(writers_of(node))


def _erase_unused(node: fx.Node) -> None:
    """Erases `node` and what only it needed, but for what the capture rests on."""
    kept = node.is_impure() or written(node) or draws_random(node) or events_of(node)
    if node.users or kept:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        _erase_unused(source)
