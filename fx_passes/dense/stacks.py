"""The weighted sum over experts' outputs that were stacked, [T, E, D] or with the experts in another place.

    (stacked * table.unsqueeze(-1)).sum(1)    torch.einsum("te,ted->td", table, stacked)
    torch.bmm(table.unsqueeze(1), stacked).squeeze(1)

`table` [T, E] has a weight for each. Or the chosen ones are taken first:

    chosen = stacked.gather(1, ids.unsqueeze(-1).expand(-1, -1, D))       or stacked[torch.arange(T)[:, None], ids]
    (chosen * weights.unsqueeze(-1)).sum(1)
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fx_passes.dense.columns import Weights
from fx_passes.dense.sums import Mixture, is_product, stacked
from fx_passes.facts.ids import are_nonnegative, num_columns
from fx_passes.facts.sparsity import chosen_by
from fx_passes.graph.numbering import numbers_rows
from fx_passes.graph.ops import CASTS, arg, fake_tensor, is_inplace, normalized_dim, only_pick, op_name, same_size
from fx_passes.graph.views import Dim, View, views_of
from fx_passes.region import Rejected

Labels = tuple[str, ...]
"""What each dim counts: "0", "1", ... tokens, "E" experts or those that were chosen, "D" features."""


@dataclass(frozen=True)
class _State:
    """What has become of the stacked outputs at `node`."""

    node: fx.Node
    labels: Labels
    nodes: tuple[fx.Node, ...]
    weights: fx.Node | None = None
    ids: fx.Node | None = None


def summed_stacks(graph: fx.Graph) -> Iterator[Mixture | Rejected]:
    """Stacks whose chosen rows are summed; and why one isn't known to be such, where tokens choose among its rows."""
    for node in graph.nodes:
        parts = stacked(node)
        if parts is None or not all(map(is_product, parts[0])):
            continue
        outputs, dim = parts
        labels = [str(place) for place in range(_rank(outputs[0]) - 1)] + ["D"]
        labels.insert(dim, "E")
        nodes = () if op_name(node) == "stack" else tuple(node.all_input_nodes)
        total = _total(_State(node, tuple(labels), (*nodes, node)))
        if total is not None and total.weights is not None:
            weights = Weights(total.weights, total.ids, by_slot=total.ids is not None)
            from_end = total.ids is not None and not are_nonnegative(total.ids)
            experts = tuple(range(len(outputs)))
            yield Mixture(outputs, experts, weights, total.nodes, total.node, counts_from_the_end=from_end)
        else:
            yield from _left(node, len(outputs))


def _left(stack: fx.Node, num_experts: int) -> Iterator[Rejected]:
    """Where rows of `stack` meet what tokens chose of so many experts."""
    for user in stack.users:
        others = (view.start for source in user.all_input_nodes if source is not stack for view in views_of(source))
        if any(num_columns(other) == num_experts or chosen_by(other) is not None for other in others):
            detail = "of what the experts computed, the rows that a token chose are not summed as they are"
            yield Rejected("slots_of_a_token_are_summed", user, detail)


def _total(state: _State) -> _State | None:
    """Where the experts are summed, if that is where `state` leads to."""
    for user in state.node.users:
        after = _step(user, state) if not is_inplace(user) else None
        if after is None:
            continue
        if "E" not in after.labels:
            return after
        total = _total(after)
        if total is not None:
            return total
    return None


def _step(node: fx.Node, state: _State) -> _State | None:
    name = op_name(node)
    if name in CASTS:
        return _cast(node, state)
    if name in ("mul", "multiply"):
        return _weighted(node, state)
    if name == "sum":
        return _summed(node, state)
    if name in ("gather", "getitem"):
        return _chosen(node, state)
    if name == "einsum":
        return _einsum(node, state)
    if name in ("matmul", "bmm"):
        return _product(node, state)
    if name in ("permute", "transpose"):
        return _permuted(node, state)
    return None


def _after(node: fx.Node, state: _State, **changes: Any) -> _State:
    return replace(state, node=node, nodes=(*state.nodes, node), **changes)


def _cast(node: fx.Node, state: _State) -> _State | None:
    """One that drops no digits."""
    before, after = fake_tensor(state.node), fake_tensor(node)
    if arg(node, 0, "input") is not state.node or before is None or after is None or before.device != after.device:
        return None
    widens = after.is_floating_point() and after.dtype.itemsize >= before.dtype.itemsize
    return _after(node, state) if widens else None


def _weighted(node: fx.Node, state: _State) -> _State | None:
    if len(node.args) != 2 or state.weights is not None or _rank(node) != len(state.labels):
        return None
    other = node.args[1] if node.args[0] is state.node else node.args[0]
    weights = _weights(other, state.labels)
    return _after(node, state, weights=weights) if weights is not None else None


def _weights(node: Any, labels: Labels) -> fx.Node | None:
    """The [T, E] tensor that `node` is, with its dims in the order of `labels`."""
    wanted = tuple(_place(label, labels) for label in labels)
    views = [view for view in views_of(node) if view.dims == wanted and _rank(view.start) == len(labels) - 1]
    return views[-1].start if views else None


def _place(label: str, labels: Labels) -> Dim:
    """Where a table [T, E] has what `label` counts."""
    if label == "D":
        return ()
    return (len(labels) - 2,) if label == "E" else (int(label),)


def _summed(node: fx.Node, state: _State) -> _State | None:
    dim = arg(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    plain = set(node.kwargs) <= {"input", "dim"} and len(node.args) <= 2
    if not plain or state.weights is None or not isinstance(dim, int):
        return None
    place = normalized_dim(dim, len(state.labels))
    left = state.labels[:place] + state.labels[place + 1 :]
    return _after(node, state, labels=left) if left == _without("E", state.labels) else None


def _chosen(node: fx.Node, state: _State) -> _State | None:
    """The outputs of the experts that each token chose."""
    if state.ids is not None or state.weights is not None or node.args[0] is not state.node:
        return None
    place = state.labels.index("E")
    if op_name(node) == "getitem":
        ids = _second_of_pair(node.args[1], state.node) if state.labels == ("0", "E", "D") else None
    else:
        dim, index = arg(node, 1, "dim"), arg(node, 2, "index")
        along = isinstance(dim, int) and normalized_dim(dim, len(state.labels)) == place
        whole = fake_tensor(index) is not None and same_size(_size(index, "D", state), _size(state.node, "D", state))
        ids = _weights(index, state.labels) if along and whole and not node.kwargs.get("sparse_grad") else None
    return _after(node, state, ids=ids) if ids is not None else None


def _size(node: fx.Node, label: str, state: _State) -> Any:
    tensor = fake_tensor(node)
    assert tensor is not None
    return tensor.shape[state.labels.index(label)]


def _second_of_pair(index: Any, stack: fx.Node) -> fx.Node | None:
    """`ids` [T, K] of `stack[torch.arange(T)[:, None], ids]`."""
    if not isinstance(index, tuple) or len(index) != 2 or not _counts_tokens(index[0], stack):
        return None
    return index[1] if _rank(index[1]) == 2 else None


def _counts_tokens(node: Any, stack: fx.Node) -> bool:
    """`torch.arange(T)[:, None]`."""
    tensor = fake_tensor(stack)
    starts = (view.start for view in views_of(node) if view.dims == ((0,), ()))
    return tensor is not None and any(numbers_rows(start, tensor.shape[0]) for start in starts)


def _einsum(node: fx.Node, state: _State) -> _State | None:
    """`einsum("te,ted->td", table, stacked)`."""
    operands = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    equation = node.args[0]
    if state.weights is not None or len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    letters = inputs.split(",")
    if operands[1] is state.node:
        operands, letters = operands[::-1], letters[::-1]
    if operands[0] is not state.node or len(letters[0]) != len(state.labels) or len(set(letters[0])) != len(letters[0]):
        return None
    names = dict(zip(state.labels, letters[0], strict=True))
    own = [label for label in state.labels if label != "D"]
    if [names[label] for label in _without("E", state.labels)] != list(out):
        return None
    if len(letters[1]) != len(own) or set(letters[1]) != {names[label] for label in own}:
        return None
    wanted = {names[label]: _place(label, state.labels) for label in own}
    dims = tuple(wanted[letter] for letter in letters[1])
    views = [view for view in views_of(operands[1]) if view.dims == dims and _rank(view.start) == len(own)]
    return _after(node, state, labels=_without("E", state.labels), weights=views[-1].start) if views else None


def _without(label: str, labels: Labels) -> Labels:
    """The other labels, tokens in their order and features last."""
    return tuple(sorted(other for other in labels if other != label))


def _product(node: fx.Node, state: _State) -> _State | None:
    """`table.unsqueeze(-2) @ stacked`, and the dim of size one goes."""
    if state.weights is not None or state.labels[-2:] != ("E", "D") or arg(node, 1, "mat2") is not state.node:
        return None
    row: list[Dim] = [_place(label, state.labels) for label in state.labels[:-2]]
    wanted = (*row, (), (len(row),))
    views = [view for view in views_of(node.args[0]) if view.dims == wanted and _rank(view.start) == len(row) + 1]
    squeezed = next(iter(node.users), node)
    if not views or len(node.users) != 1 or not _drops_dim(squeezed, node, len(row)):
        return None
    return _after(
        squeezed,
        replace(state, nodes=(*state.nodes, node)),
        labels=_without("E", state.labels),
        weights=views[-1].start,
    )


def _drops_dim(node: fx.Node, source: fx.Node, dim: int) -> bool:
    """Whether `node` is `source` without that dim, of size one."""
    kept = tuple((place,) for place in range(_rank(source)) if place != dim)
    return any(view == View(source, kept, view.steps) for view in views_of(node)) or _selects_only(node, source, dim)


def _selects_only(node: fx.Node, source: fx.Node, dim: int) -> bool:
    """`source[..., 0, :]`."""
    if op_name(node) != "getitem" or node.args[0] is not source or not isinstance(node.args[1], tuple):
        return False
    pick = only_pick(node.args[1], _rank(source))
    return pick is not None and pick[0] == dim and type(pick[1]) is int and pick[1] == 0


def _permuted(node: fx.Node, state: _State) -> _State | None:
    view = next((view for view in views_of(node) if view.start is state.node and view.steps == (node,)), None)
    if view is None or any(len(dim) != 1 for dim in view.dims):
        return None
    return _after(node, state, labels=tuple(state.labels[dim[0]] for dim in view.dims))


def _rank(node: Any) -> int:
    tensor = fake_tensor(node)
    return tensor.dim() if tensor is not None else -1
