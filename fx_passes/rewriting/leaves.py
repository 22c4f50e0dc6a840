"""Fresh zeros that require a gradient, which nobody ever reads: `zeros(..., requires_grad=True).index_add(0, ...)`.

Dynamo breaks the graph there. They are captured as plain zeros, which is the same where all that is made of them
requires a gradient anyway, or none is recorded.
"""

from torch import fx

from fx_passes.graph.ops import arg, fake_tensor, op_name

_LEAF = "scatter_moe_leaf"
_INTO_COPIES = frozenset(("scatter", "scatter_add", "index_add"))


def mark_leaf(node: fx.Node) -> None:
    node.meta[_LEAF] = True


def is_leaf(node: fx.Node) -> bool:
    return node.meta.get(_LEAF, False)


def changes_nothing(zeros: fx.Node) -> bool:
    """Whether `zeros`, a leaf, may as well not require a gradient."""
    return all(_requires_grad_anyway(user, zeros) for user in zeros.users)


def _requires_grad_anyway(user: fx.Node, zeros: fx.Node) -> bool:
    result, source = fake_tensor(user), fake_tensor(user.kwargs.get("src", arg(user, 3, "source")))
    if op_name(user) not in _INTO_COPIES or arg(user, 0, "input") is not zeros or result is None:
        return False
    return not result.requires_grad or (source is not None and source.requires_grad)
