"""A fixed number of places for each expert: recognised, and left as it is.

    rows = torch.einsum("tec,td->ecd", dispatch, x)                  # dispatch: [T, E, C], or with groups [G, S, E, C]
    y = torch.einsum("ecf,efd->ecd", activation(rows @ up), down)
    out = torch.einsum("tec,ecd->td", combine, y)

    scores, tokens = logits.softmax(-1).t().topk(C, -1)              # expert choice: tokens [E, C]
    y = torch.bmm(activation(torch.bmm(x[tokens], up)), down)

Which tokens fit depends on the others, and empty places are computed as well: that is not what routed rows would give.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import fx

from fx_passes.graph.ops import arg, fake_tensor, normalized_dim, op_name, same_sizes, sizes_of
from fx_passes.region import Rejected

NAME = "fixed_capacity"

_VIEWS = frozenset("view reshape flatten unsqueeze expand getitem to contiguous transpose permute t".split())
_STEPS = 8


def candidates(graph: fx.Graph) -> Iterator[Rejected]:
    """What says why the experts are left as they are."""
    dispatched = [node for node in graph.nodes if _is_dispatch(node)]
    for node in dispatched:
        if any(_is_combine(user, node) for user in graph.nodes if user > node):
            detail = "each expert has a fixed number of places: tokens beyond it are dropped, empty ones computed"
            yield Rejected("every_chosen_token_is_computed", node, detail)
    for node in graph.nodes:
        if _takes_chosen_tokens(node):
            yield Rejected("tokens_choose_their_experts", node, "each expert chooses its tokens")


def match(found: Rejected) -> NoReturn:
    raise found


def _is_dispatch(node: fx.Node) -> bool:
    """`einsum("tec,td->ecd", dispatch, x)`: two dims more than the tokens have, and tokens are summed."""
    letters = _letters(node)
    if letters is None:
        return False
    for table, rows in (letters[:2], letters[1::-1]):
        places, features, summed = table - rows, rows - table, (table & rows) - letters[2]
        if len(places) == 2 and len(features) == 1 and summed and letters[2] >= places | features:
            return True
    return False


def _is_combine(node: fx.Node, dispatch: fx.Node) -> bool:
    """`einsum("tec,ecd->td", combine, y)`: both dims of places are summed; the tables are equal in size."""
    letters = _letters(node)
    if letters is None or len((letters[0] & letters[1]) - letters[2]) != 2:
        return False
    sizes = [sizes_of(source) for source in node.all_input_nodes]
    return any(same_sizes(sizes_of(table), own) for table in dispatch.all_input_nodes for own in sizes if len(own) >= 3)


def _letters(node: fx.Node) -> tuple[set[str], set[str], set[str]] | None:
    """Those of both operands and of the result of an einsum."""
    equation = arg(node, 0, "equation") if op_name(node) == "einsum" else None
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    return set(left), set(right), set(out)


def _takes_chosen_tokens(node: fx.Node) -> bool:
    """Rows of the best tokens of each expert, that are multiplied with its matrix."""
    index = node.args[1] if op_name(node) == "getitem" else arg(node, 2, "index")
    if op_name(node) not in ("getitem", "index_select", "gather") or not isinstance(index, fx.Node):
        return False
    experts = _experts_that_choose(index)
    return experts is not None and any(_multiplies(user, experts) for user in _readers(node))


def _experts_that_choose(node: Any) -> int | None:
    """E where `node` holds the indices of a topk along the tokens, [E, C] or [C, E]."""
    for _ in range(_STEPS):
        source = arg(node, 0, "input") if isinstance(node, fx.Node) else None
        if not isinstance(source, fx.Node):
            return None
        if op_name(node) == "getitem" and op_name(source) == "topk":
            sizes, dim = sizes_of(arg(source, 0, "input")), arg(source, 2, "dim", -1)
            others = [size for at, size in enumerate(sizes) if at != normalized_dim(dim, len(sizes))]
            return others[0] if node.args[1] == 1 and len(others) == 1 and type(others[0]) is int else None
        if op_name(node) not in _VIEWS:
            return None
        node = source
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads `node`, through views of it."""
    for user in node.users:
        yield user
        if op_name(user) in _VIEWS:
            yield from user.users


def _multiplies(node: fx.Node, experts: int) -> bool:
    """Whether `node` is a product with a stack of that many matrices."""
    if op_name(node) not in ("bmm", "matmul", "einsum", "baddbmm"):
        return False
    stacks = (fake_tensor(source) for source in node.all_input_nodes)
    return any(isinstance(s, torch.nn.Parameter) and s.dim() == 3 and s.shape[0] == experts for s in stacks)
