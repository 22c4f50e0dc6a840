"""How many slots each expert has, as Python numbers: `counts.tolist()`, `for n in counts.cpu().numpy()`.

Dynamo cannot know them. They become numbers without a value, one an expert. Comparing one with zero asks whether the
expert has a token; what is cut from the end of one expert to that of the next are the expert's rows (segments.py).
Tensors that say one of them are in bounds.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.lists import ListVariable
from torch._dynamo.variables.tensor import NumpyNdarrayVariable, SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size

from fx_passes.capture.events import Event, Scope, tag
from fx_passes.facts import fact, is_made_of_counts, is_made_of_slots
from fx_passes.facts.ids import gated_ids, ids_are_below, ids_are_distinct, listings_of_gates
from fx_passes.facts.statements import Counts, Hit, Mask
from fx_passes.facts.tallies import fills_of
from fx_passes.facts.totals import total_of
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.markers import expert_count
from fx_passes.graph.ops import known_tensor

_MATRIX = 2
"""Dims of a tensor that is no list of numbers."""


@dataclass(frozen=True, eq=False)
class Counted:
    """The numbers of slots by expert, as the tensor `node` has them.

    `sizes` are they, `sums` their running sums, from 0 on. The rows of expert e lie from `ends[e]` to `ends[e + 1]`
    where all lie expert by expert.
    """

    event: Event
    node: fx.Node
    counts: Counts
    sizes: tuple[torch.SymInt, ...]
    sums: tuple[int | torch.SymInt, ...]
    ends: tuple[Any, ...]

    @property
    def total(self) -> int | torch.SymInt:
        """The number of slots; where some may be left out, that of those which are listed."""
        listings = listings_of_gates(self.counts.ids)
        return known_tensor(listings[0]).shape[0] if listings else known_tensor(self.counts.ids).numel()

    @property
    def size_symbols(self) -> frozenset[Any]:
        return frozenset(map(expression, self.sizes))

    def between(self, first: int, stop: int) -> int | torch.SymInt:
        """How many slots the experts from `first` to before `stop` have."""
        if first + 1 == stop:
            return self.sizes[first]
        return self.sums[stop] if first == 0 else self.sums[stop] - self.sums[first]

    def expert_between(self, start: Any, stop: Any) -> int | None:
        """The expert whose rows lie from `start` to `stop`."""
        first, last = expression(start), expression(stop)
        pairs = enumerate(zip(self.ends, self.ends[1:], strict=False))
        return next((expert for expert, (begin, end) in pairs if begin == first and end == last), None)


def read(capture: Any, tx: Any, tensor: TensorVariable) -> VariableTracker | None:
    """`counts.tolist()`: the list of numbers that the items of `tensor` are, if it counts the slots of experts."""
    known = fact(tensor.as_proxy().node)
    if known is None:
        reject_other_numbers(capture, tx, tensor.as_proxy().node)
    may_be_fewer = isinstance(known, Counts) and known.open_ended and is_of_experts(known)
    return None if may_be_fewer else _numbers(capture, tx, tensor)


def reject_other_numbers(capture: Any, tx: Any, node: fx.Node) -> None:
    """Says so where `node`, which Python reads, is made of experts' numbers of slots and isn't known to be these.

    Where numbers were left to Dynamo, it has been said why.
    """
    tensor = known_tensor(node)
    if capture.uncounted:
        return
    if tensor.dtype in (torch.int32, torch.int64) and tensor.dim() < _MATRIX and is_made_of_counts(node):
        detail = "numbers are read that are not known to be how many slots each expert has"
        capture.reject(tx, "segments_are_those_of_an_expert", detail)


def cumsum(
    _capture: Any, tx: Any, array: TensorVariable, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """`counts.numpy().cumsum(0)`, where it is still known to be of counts."""
    known = fact(array.as_proxy().node)
    is_along_all = not kwargs and all(arg.is_python_constant() and arg.as_python_constant() == 0 for arg in args)
    if not isinstance(array, NumpyNdarrayVariable) or not isinstance(known, Counts) or not is_along_all:
        return None
    return NumpyNdarrayVariable.create(
        tx, tx.output.create_proxy("call_function", torch.cumsum, (array.as_proxy(), 0), {})
    )


def iterate(capture: Any, tx: Any, array: VariableTracker, header: Any) -> VariableTracker | None:
    """`for n in counts.numpy()`, perhaps enumerated, with the loop header `header`: the list of numbers.

    Where the array may be shorter, iterations at its end may be missing: they belong to experts without tokens.
    """
    array = array.realize()
    if not isinstance(array, NumpyNdarrayVariable):
        return None
    node = array.as_proxy().node
    known = fact(node)
    if isinstance(known, Counts) and known.open_ended and not capture.shows_all(tx):
        return None
    numbers = _numbers(capture, tx, array)
    counted = counted_by(capture, tx, node) if numbers is not None else None
    if counted is None or not isinstance(known, Counts) or not known.open_ended:
        return numbers
    hit, experts = Hit(known.ids, known.num_classes), iter(range(known.num_classes))
    capture.scopes.append(Scope(counted.event, tx, header, len(tx.stack), None, loop_over=hit, experts=experts))
    return numbers


def subscript(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`counts.numpy()[e]` with a Python number e."""
    array, index = tx.stack[-2].realize(), tx.stack[-1].realize()
    if not isinstance(array, NumpyNdarrayVariable) or not index.is_python_constant():
        return False
    numbers = _numbers(capture, tx, array)
    place = index.as_python_constant()
    if numbers is None or type(place) is not int or not 0 <= place < len(numbers.items):
        return False
    tx.popn(2)
    tx.push(numbers.items[place])
    tx.instruction_pointer += 1
    return True


def _numbers(capture: Any, tx: Any, tensor: TensorVariable) -> ListVariable | None:
    """The items of `tensor`, if it counts the slots of experts."""
    node = tensor.as_proxy().node
    known = fact(node)
    if not isinstance(known, Counts) or known.positive:
        return None
    if set(writers_of(node)) - fills_of(node):
        capture.reject(tx, "nothing_is_written_inside", "the experts' numbers of slots change once they were counted")
        return None
    if node not in capture.numbers:
        counted = counted_by(capture, tx, node)
        if counted is None:
            return None
        ranges = [(0 if known.cumulative else e, e + 1) for e in range(known.num_classes)]
        capture.numbers[node] = [as_variable(capture, tx, counted, *experts) for experts in ranges]
    return ListVariable(list(capture.numbers[node]), mutation_type=ValueMutationNew())


def counted_by(capture: Any, tx: Any, node: fx.Node) -> Counted | None:
    """The numbers that `node` counts, where these are all slots of the experts."""
    known = fact(node)
    assert isinstance(known, Counts)
    return counted_as(capture, tx, known, lambda _event: node)


def counted_as(capture: Any, tx: Any, known: Counts, make: Callable[[Event], fx.Node]) -> Counted | None:
    """The numbers that are `known`; where these are the first such, `make` gives the tensor that has them."""
    for counted in capture.counted:
        if (counted.counts.ids, counted.counts.num_classes) == (known.ids, known.num_classes):
            return counted
    if not is_of_experts(known):
        # One id a token is counted in much else than a layer of experts.
        if known_tensor(known.ids).dim() == 2 or is_made_of_slots(known.ids):
            capture.reject(tx, "ids_are_in_range", "ids are counted that are not known to be those of an expert")
        return None
    if known.ids in capture.uncounted:
        return None
    event = capture.event(tx, "counts of tokens")
    if capture.is_denied(event):
        capture.uncounted.add(known.ids)
        return None
    return _count(capture, event, make(event), known)


def is_of_experts(counts: Counts) -> bool:
    """Whether each slot is counted, once, with an expert below `num_classes`."""
    ids = counts.ids
    if gated_ids(ids) is not None:  # their own count alone has those ids
        return True
    if not ids_are_below(ids, counts.num_classes):
        return False
    return not counts.reduced or ids_are_distinct(ids)


def _count(capture: Any, event: Event, node: fx.Node, known: Counts) -> Counted:
    shape_env, sizes = capture.output.shape_env, []
    with shape_env.ignore_fresh_unbacked_symbols():
        for _ in range(known.num_classes):
            sizes.append(shape_env.create_unbacked_symint())
            _constrain_range_for_size(sizes[-1])
    capture.forget_new_symbols()
    sums = tuple(accumulate(sizes, initial=0))
    counted = Counted(event, node, known, tuple(sizes), sums, tuple(map(expression, sums)))
    capture.counted.append(counted)
    for e, size in enumerate(sizes):
        capture.masks_of_symbol[expression(size)] = Mask(known.ids, e, ("N",))
    return counted


def as_variable(capture: Any, tx: Any, counted: Counted, first: int, stop: int) -> VariableTracker:
    """How many slots the experts from `first` to before `stop` have, as a number."""
    arguments = (capture.proxy(counted.node), first, stop)
    proxy = capture.output.create_proxy("call_function", expert_count, arguments, {})
    tag(proxy.node, (counted.event.number,), ())
    return SymNodeVariable.create(tx, proxy, counted.between(first, stop))


def counted_expression(capture: Any, node: fx.Node) -> Any:
    """The number that `node`, a tensor, is, in terms of the experts' numbers of slots; None where it isn't known."""
    known = total_of(node)
    if known is None:
        return None
    for counted in capture.counted:
        if (counted.counts.ids, counted.counts.num_classes) == (known.ids, known.num_experts):
            return expression(counted.between(known.first, known.stop))
    return None


def expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)
