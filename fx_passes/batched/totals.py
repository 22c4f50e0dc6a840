"""The sum over the experts of each token.

y.sum(0)                                                of rows [E, T, D]
out.index_add_(0, tokens, y)                            tokens = arange(T).repeat(E), the token of each row
out.scatter_add_(0, tokens[:, None].expand(-1, D), y)
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from fx_passes.batched.moves import refused
from fx_passes.batched.row_graph import RowGraph, features_of
from fx_passes.batched.rows import Labels, Rows, Seen, Total, are_tokens
from fx_passes.graph.aliasing import allocates
from fx_passes.graph.ops import arg, is_inplace, known_tensor, normalized_dim, op_name, same_size, sizes_of
from fx_passes.graph.row_index import have_one_width
from fx_passes.graph.views import Dim, repeated_numbers
from fx_passes.region import Rejected
from fx_passes.rules.loop import asks_for_metadata

ADDITIONS = frozenset("index_add index_add_ scatter_add scatter_add_".split())
_TOKENS: dict[Labels, Dim] = {("M",): ("t", 0), ("N",): ("r", 0)}
"""How the numbers of the tokens are repeated where rows are counted so."""


def summed(node: fx.Node, rows: Rows) -> Total:
    """`y.sum(dim)`."""
    dim = arg(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    plain = set(node.kwargs) <= {"dim", "input"} and len(node.args) <= 2 and not rows.unit
    if not isinstance(dim, int) or not plain:
        raise refused(node)
    place = normalized_dim(dim, known_tensor(node.args[0]).dim())
    left = rows.labels[:place] + rows.labels[place + 1 :]
    if place >= len(rows.labels) or not are_tokens(left) or len(features_of(rows.value)) != 1:
        raise Rejected("slots_of_a_token_are_summed", node, "not the sum over the experts of each token")
    return Total(rows.value, token_dims=len(left))


def added_up(graph: RowGraph, node: fx.Node, seen: Callable[[Any], Seen | None]) -> Total:
    """One of ADDITIONS, of rows to another tensor."""
    onto, dim, index = (arg(node, at, name) for at, name in enumerate(("input", "dim", "index")))
    source = arg(node, 3, "source" if "index" in str(op_name(node)) else "src")
    rows = seen(source)
    if not isinstance(rows, Rows) or rows.unit or dim != 0 or arg(node, 4, "alpha", 1) != 1:
        raise Rejected("accumulation_is_a_plain_sum", node, f"`{op_name(node)}` that adds something else than rows")
    numbers = repeated_numbers(index, graph.sizes["T"])
    are_tokens = numbers == _TOKENS.get(rows.labels, ()) and same_size(sizes_of(index)[0], sizes_of(source)[0])
    are_rows = len(sizes_of(index)) == 1 or have_one_width(index, source, onto)
    if not are_tokens or not are_rows or len(features_of(rows.value)) != 1:
        raise Rejected("slots_of_a_token_are_summed", node, "rows are not added to the tokens that they belong to")
    if is_inplace(node):
        _require_own_memory(onto, node)
    return Total(rows.value, onto)


def _require_own_memory(onto: fx.Node, write: fx.Node) -> None:
    """What is written to has no other name, and nobody has read it before."""
    early = [user for user in onto.users if user < write and not asks_for_metadata(user, onto)]
    if not allocates(onto) or early:
        seen = early[0].name if early else onto.name
        raise Rejected("nothing_is_written_inside", write, f"`{op_name(write)}` writes to what `{seen}` holds, too")
