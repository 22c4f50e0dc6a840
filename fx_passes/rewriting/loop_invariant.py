"""What an iteration computes from outside the loop alone: it may stay once the loop is gone.

    1.0 + self.norm.weight          W.view(E, F, D)          W[0] + B[0] @ A[0]

It must have no effect, and code of ours alone may read it: what follows the loop would see that an iteration ran.
"""

from torch import fx

from fx_passes.capture import events_of
from fx_passes.graph.ops import OF_PARAMETERS, is_inplace, op_name

_MADE_BY_REWRITE = "scatter_moe_made_by_rewrite"
_VIEWS = frozenset(("view", "reshape", "unflatten", "transpose", "permute", "getattr", "t"))


def mark_as_ours(node: fx.Node) -> None:
    """Remembers that a rewrite made `node`."""
    node.meta[_MADE_BY_REWRITE] = True


def is_left_for_ours(node: fx.Node) -> bool:
    """Whether `node`, which was traced in a loop, may stay for the code that stands in the loop's place."""
    return _is_invariant(node) and _is_read_by_ours_alone(node)


def _is_invariant(node: fx.Node) -> bool:
    picks = op_name(node) == "getitem" and len(node.all_input_nodes) == 1
    if (op_name(node) not in OF_PARAMETERS | _VIEWS and not picks) or is_inplace(node):
        return False
    return all(not events_of(source) or _is_invariant(source) for source in node.all_input_nodes)


def _is_read_by_ours_alone(node: fx.Node) -> bool:
    return bool(node.users) and all(
        _MADE_BY_REWRITE in user.meta or (_is_invariant(user) and _is_read_by_ours_alone(user)) for user in node.users
    )
