"""Where the result of naive code is rounded."""

from torch import fx

from fx_passes.graph.ops import arg, casts_floats, known_tensor


def with_cast(total: fx.Node) -> fx.Node:
    """The cast of `total` where nothing else reads it and the cast drops digits: the op then rounds once."""
    user = next(iter(total.users), total)
    if len(total.users) != 1 or not casts_floats(user) or arg(user, 0, "input") is not total:
        return total
    before, after = known_tensor(total), known_tensor(user)
    narrows = after.dtype == before.dtype or after.dtype.itemsize < before.dtype.itemsize
    return user if narrows and after.device == before.device else total


def keeps_digits(cast: fx.Node, result: fx.Node) -> bool:
    """Whether `cast` drops no digits that `result`, which is computed from it, has place for."""
    before, own, last = (known_tensor(node).dtype for node in (arg(cast, 0, "input"), cast, result))
    return any(own == other or own.itemsize > other.itemsize for other in (before, last))
