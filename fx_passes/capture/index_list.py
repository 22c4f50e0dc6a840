"""`tokens.tolist()` where the list only serves as an index: then the tensor does as well.

So it does for `hit.tolist()`, where the list only serves to loop over it (loops.py), and for `set(ids.tolist())`, which
has the experts with a token, too, and can be `sorted` or made a list again. The list has no known items, so a
question about them that Python could ask (`==`, truth, iteration, `append`) takes the assumption back. What it shares
with every list of its length is answered: `len`, `isinstance`, `type`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable

from fx_passes.capture.events import Event, tag
from fx_passes.capture.variables import call_in_graph, rank_of
from fx_passes.facts import fact
from fx_passes.facts.ids import ids_dims, num_columns
from fx_passes.facts.statements import Hit, Rows
from fx_passes.graph.markers import index_list


class IndexListVariable(ListVariable):
    """A list of row positions or of experts, of which only the tensor that it was made from is known."""

    def __init__(self, tensor: TensorVariable, event: Event, take_back: Callable[[], NoReturn], **kwargs: Any) -> None:
        super().__init__([], **kwargs)
        self.tensor = tensor
        self.event = event
        self.take_back = take_back

    @property
    def items(self) -> list[VariableTracker]:
        self.take_back()

    @items.setter
    def items(self, _items: list[VariableTracker]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The items stay unknown."""

    def sq_length(self, tx: Any) -> VariableTracker:
        return self.tensor.call_method(tx, "size", [ConstantVariable.create(0)], {})

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
        return self.sq_length(tx) if name == "__len__" else self.take_back()

    def __repr__(self) -> str:
        return f"IndexListVariable({self.tensor})"


class IdsVariable(IndexListVariable):
    """`ids.tolist()`. Only which experts are among them is known."""


class HitSetVariable(IndexListVariable):
    """A set of the experts with a token."""

    def python_type(self) -> type:
        return set


def read(capture: Any, tx: Any, indices: TensorVariable) -> VariableTracker | None:
    """`tokens.tolist()`, `hit.tolist()`, `ids.tolist()`."""
    node = indices.as_proxy().node
    known = fact(node)
    is_hit = isinstance(known, Hit) and not known.as_tuple and rank_of(indices) == 1
    is_ids = ids_dims(node) == ("T",) and num_columns(node) is not None
    if not isinstance(known, Rows) and not is_hit and not is_ids:
        return None
    event = capture.event(tx, "index list")
    if capture.is_denied(event):
        return None

    def take_back() -> Any:
        if is_hit or is_ids:
            detail = "the list of experts with a token is used otherwise than to loop over it"
            capture.reject(tx, "loop_is_over_the_hit_experts", detail)
        capture.trace_again_without([event])

    if is_ids:
        return IdsVariable(indices, event, take_back)
    tensor = call_in_graph(tx, index_list, indices.as_proxy())
    tag(tensor.as_proxy().node, (event.number,), ())
    return IndexListVariable(tensor, event, take_back)


def convert(tx: Any, called: Any, args: Sequence[VariableTracker], kwargs: Any) -> VariableTracker | None:
    """`set(ids.tolist())`; `sorted` or `list` of that, or of the list of experts with a token."""
    numbers = args[0].realize() if len(args) == 1 and not kwargs else None
    if isinstance(numbers, IdsVariable) and called is set:
        hit = numbers.tensor.call_method(tx, "unique", [], {})
        tag(hit.as_proxy().node, (numbers.event.number,), ())
        return HitSetVariable(hit, numbers.event, numbers.take_back)
    if not isinstance(numbers, IndexListVariable) or not isinstance(fact(numbers.tensor.as_proxy().node), Hit):
        return None
    kind = HitSetVariable if called is set else IndexListVariable
    return kind(numbers.tensor, numbers.event, numbers.take_back)


def index_by_tensors(tx: Any) -> None:
    """`tensor[index]`, about to be read or written: lists of row positions in the index become tensors."""
    container, index = tx.stack[-2].realize(), tx.stack[-1].realize()
    if not isinstance(container, TensorVariable):
        return
    if isinstance(index, TupleVariable) and any(isinstance(item, IndexListVariable) for item in index.items):
        tx.stack[-1] = TupleVariable([_as_tensor(item) for item in index.items])
    else:
        tx.stack[-1] = _as_tensor(index)


def _as_tensor(index: VariableTracker) -> VariableTracker:
    return index.tensor if isinstance(index, IndexListVariable) else index
