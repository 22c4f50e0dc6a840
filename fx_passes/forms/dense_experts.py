"""Every expert on every token at once, and weights that are zero but for the top-k.

    table = torch.zeros(T, E).scatter(1, ids, weights)
    h = torch.bmm(x.repeat(E, 1).view(E, T, D), up) + up_bias[:, None]              # up: [E, D, F]
    y = torch.bmm(activation(h), down)
    out = (y * table.t()[..., None]).sum(0)

or with einsum, "td,edf->etf" or "td,edf->tef". Tokens may stand in two dims, "bsd,edf->bsef" with a table [B, S, E], or
come to stand so before the sum, y.view(E, B, S, D). The weights may be on the input (llama4), where zero rows stay zero
up to the sum. Tokens may be repeated and added up by their numbers, to zeros or to a tensor that is there already:

    tokens = torch.arange(T).repeat(E)
    rows = x[tokens] * table.t().reshape(-1, 1)                                     # or x.gather(0, ...)
    out.index_add_(0, tokens, experts(rows.view(E, T, D)).view(-1, D))              # or scatter_add_

A mixture in which every expert counts is left as it is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fx_passes.batched.rows import PAIRS, PAIRS_BY_BATCH, Total
from fx_passes.batched.walk import Walk
from fx_passes.body.values import PerExpert, SlotGathered
from fx_passes.facts.ids import ids_are_distinct, is_single_choice, num_choices
from fx_passes.facts.sparsity import adds_nothing_where_unchosen, chosen_by
from fx_passes.facts.statements import TOKENS_BY_BATCH
from fx_passes.forms.accumulation import closure
from fx_passes.forms.summation import summation
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name, same_size, same_sizes, sizes_of
from fx_passes.graph.views import views_of
from fx_passes.region import MoERegion, Rejected

NAME = "dense_experts"

Size = int | torch.SymInt

_STEPS_FROM_TABLE = 4

UNCHOSEN = "an expert with weight zero is not computed: an infinite or NaN result or weight would have given NaN"


@dataclass(frozen=True)
class Mixture:
    """The products of all experts, the node that sums over the experts, and what it sums."""

    products: tuple[fx.Node, ...]
    node: fx.Node
    total: Total
    walk: Walk
    num_experts: int


@dataclass(frozen=True)
class Unproven:
    """Rows of all experts beside weights that are zero but for the top-k, and the rule that is broken at `node`."""

    node: fx.Node
    reason: Rejected


def candidates(graph: fx.Graph) -> Iterator[Mixture | Unproven]:
    """Sums over experts, of rows that were multiplied with a parameter [E, ...]. Other such products are common."""
    products = [(node, stacked) for node in graph.nodes for stacked in _stacked(node)]
    while products:
        found = _mixture([node for node, _ in products], products[0][1])
        if isinstance(found, Unproven) or (found is not None and any(_tables(found))):
            yield found
        last = found.node if found is not None else products[0][0]
        products = [(node, stacked) for node, stacked in products if node > last]


def match(found: Mixture | Unproven) -> MoERegion:
    if isinstance(found, Unproven):
        raise found.reason
    body = found.walk.body(found.total.rows)
    ids = _chosen(found)
    end = summation(found.node, found.total, found.products)
    _require_sizes_before(found)
    return MoERegion(
        form=NAME,
        ids_TK=ids,
        top_k=num_choices(ids),
        num_experts=found.num_experts,
        body=body,
        routing=frozenset((*found.products, *found.walk.steps)),
        inner=end.inner,
        result=end.result,
        output=known_tensor(end.result),
        writes=end.writes | found.walk.writes,
        deviations=(UNCHOSEN,),
        buffers=end.buffers,
        addend=end.addend,
        token_dims=found.total.token_dims,
    )


def _require_sizes_before(found: Mixture) -> None:
    """Where tokens have several dims, something had these before the experts, whose output has them too."""
    count = found.total.token_dims
    sizes, earlier = sizes_of(found.node)[:count], (n for n in found.node.graph.nodes if n < found.products[0])
    if count > 1 and not any(same_sizes(sizes_of(node)[:count], sizes) for node in earlier):
        raise Rejected("rows_belong_to_tokens", found.node, "tokens stand in dims that they did not have before")


def _stacked(node: fx.Node) -> Iterator[fx.Node]:
    """The parameter [E, ...] that `node` multiplies with."""
    if op_name(node) in ("bmm", "matmul", "einsum"):
        starts = (view.start for operand in node.all_input_nodes for view in views_of(operand)[:1])
        yield from [start for start in starts if _is_stack_of_matrices(start)][:1]


def _is_stack_of_matrices(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return isinstance(tensor, torch.nn.Parameter) and tensor.dim() == 3 and tensor.is_floating_point()


def _mixture(products: list[fx.Node], stacked: fx.Node) -> Mixture | Unproven | None:
    num_experts = known_tensor(stacked).shape[0]
    if not isinstance(num_experts, int):
        return None
    everything = closure(products, stops=frozenset())
    found = None
    for tokens in _token_sizes(products[0], num_experts, everything):
        found = _mixture_of(products, everything, num_experts, tokens)
        if isinstance(found, Mixture):
            return found
    return found


def _token_sizes(product: fx.Node, num_experts: int, after: frozenset[fx.Node]) -> list[tuple[Size, ...]]:
    """The sizes that tokens may have in `product`, with the experts before or behind them, or in what is made of it."""
    sizes = sizes_of(product)[:-1]
    places = [place for place in (0, len(sizes) - 1) if sizes and same_size(sizes[place], num_experts)]
    found = [sizes[:place] + sizes[place + 1 :] for place in places if len(sizes) in (2, 3)]
    if len(sizes) != 2:
        return found
    cut = (sizes_of(node) for node in sorted(after) if op_name(node) in ("view", "reshape", "unflatten"))
    by_batch = [own[1:3] for own in cut if len(own) == 4 and same_size(own[0], num_experts)]
    whole = [own for own in by_batch for tokens in found if same_size(own[0] * own[1], tokens[0])]
    return [*whole[:1], *found]


def _mixture_of(
    products: list[fx.Node], everything: frozenset[fx.Node], num_experts: int, tokens: tuple[Size, ...]
) -> Mixture | Unproven | None:
    count = math.prod(tokens)
    sizes = {"T": count, "K": 0, "N": count, "E": num_experts, "M": num_experts * count}
    by_batch = dict(zip(TOKENS_BY_BATCH, tokens, strict=False)) if len(tokens) == 2 else {}
    walk = Walk(everything, PAIRS_BY_BATCH if by_batch else PAIRS, sizes | by_batch)
    for node in products[0].graph.nodes:
        try:
            seen = walk.seen(node) if node in everything else None
        except Rejected as reason:
            meets = any(map(_chosen_by, walk.tables)) or any(map(_comes_of_chosen, _inputs_of(everything)))
            return Unproven(node, reason) if meets else None
        if isinstance(seen, Total):
            own = tuple(product for product in products if product < node)
            return Mixture(own, node, seen, walk, num_experts)
    return None


def _inputs_of(nodes: frozenset[fx.Node]) -> set[fx.Node]:
    return {source for node in nodes for source in node.all_input_nodes} - nodes


def _comes_of_chosen(node: Any, steps: int = _STEPS_FROM_TABLE) -> bool:
    """Whether `node` is, or was lately made of, a table that is zero but for the top-k; perhaps by a product."""
    if fake_tensor(node) is None or not steps:
        return False
    if any(chosen_by(node, experts) is not None for experts in (-1, -2)):
        return True
    operands = node.args if op_name(node) in ("mul", "multiply") else (arg(node, 0, "input"),)
    return any(_comes_of_chosen(operand, steps - 1) for operand in operands)


def _chosen(found: Mixture) -> fx.Node:
    """The ids outside of which all weights are zero, and with them what is added."""
    ids = {_chosen_by(table) for table in _tables(found) if table.table}
    chosen = ids.pop() if len(ids) == 1 else None
    if chosen is None or not adds_nothing_where_unchosen(found.total.rows):
        raise Rejected(
            "weights_are_zero_outside_the_top_k", found.node, "every expert may count for every token: it stays dense"
        )
    if not is_single_choice(chosen) and not ids_are_distinct(chosen):
        raise Rejected("repeated_ids_are_counted", found.node, "the ids of a token may repeat")
    if any(not same_size(known_tensor(p.parameters[0]).shape[0], found.num_experts) for p in _parameters(found)):
        raise Rejected("every_expert_is_covered", found.node, "weights of another number of experts")
    return chosen


def _chosen_by(table: SlotGathered) -> fx.Node | None:
    return chosen_by(table.source, -2 if table.experts_first else -1)


def _tables(found: Mixture) -> Iterator[SlotGathered]:
    return found.walk.body(found.total.rows).of(SlotGathered)


def _parameters(found: Mixture) -> Iterator[PerExpert]:
    return found.walk.body(found.total.rows).of(PerExpert)
