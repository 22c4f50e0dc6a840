"""How many slots each expert has, as Python numbers: `counts.tolist()`, `for n in counts.cpu().numpy()`.

Dynamo cannot know them. They become numbers without a value, one an expert. Comparing one with zero asks whether the
expert has a token; what is cut from the end of one expert to that of the next are the expert's rows (segments.py).
"""

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

from fx_passes.aliasing import storage_of, writers_of
from fx_passes.capture.events import Event, Scope, tag
from fx_passes.facts import fact
from fx_passes.ids import ids_are_below, ids_are_distinct
from fx_passes.markers import expert_count
from fx_passes.ops import known_tensor
from fx_passes.statements import Counts, Mask


@dataclass(frozen=True, eq=False)
class Counted:
    """The numbers of slots by expert that were read from the tensor `node`.

    `sizes` are they, `ends` their running sums: the rows of expert e lie from `ends[e]` to `ends[e + 1]` where all lie
    expert by expert.
    """

    event: Event
    node: fx.Node
    counts: Counts
    sizes: tuple[torch.SymInt, ...]
    ends: tuple[Any, ...]

    @property
    def total(self) -> int | torch.SymInt:
        return known_tensor(self.counts.ids).numel()

    @property
    def size_symbols(self) -> frozenset[Any]:
        return frozenset(map(expression, self.sizes))

    def expert_between(self, start: Any, stop: Any) -> int | None:
        """The expert whose rows lie from `start` to `stop`."""
        first, last = expression(start), expression(stop)
        pairs = enumerate(zip(self.ends, self.ends[1:], strict=False))
        return next((expert for expert, (begin, end) in pairs if begin == first and end == last), None)


def read(capture: Any, tx: Any, tensor: TensorVariable) -> VariableTracker | None:
    """`counts.tolist()`: the list of numbers that the items of `tensor` are, if it counts the slots of experts."""
    known = fact(tensor.as_proxy().node)
    is_open = isinstance(known, Counts) and known.open_ended
    return None if is_open else _numbers(capture, tx, tensor)


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
    known = fact(array.as_proxy().node)
    numbers = _numbers(capture, tx, array)
    if numbers is None or not isinstance(known, Counts) or not known.open_ended:
        return numbers
    ids, experts = known.ids, iter(range(known.num_classes))
    event = capture.counted[-1].event
    capture.scopes.append(Scope(event, tx, header, len(tx.stack), None, loop_over=ids, experts=experts))
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
    if not isinstance(known, Counts) or known.positive or any(writers_of(storage_of(node))):
        return None
    if node in capture.numbers:
        return ListVariable(list(capture.numbers[node]), mutation_type=ValueMutationNew())
    if not is_of_experts(known):
        if known_tensor(known.ids).dim() == 2:  # one id a token is counted in much else than a layer of experts
            capture.reject(tx, "ids_are_in_range", "ids are counted that are not known to be those of an expert")
        return None
    event = capture.event(tx, "counts of tokens")
    if capture.is_denied(event):
        return None
    counted = _count(capture, event, node, known)
    values = accumulate(counted.sizes) if known.cumulative else counted.sizes
    items = [_as_variable(capture, tx, event, tensor, e, value) for e, value in enumerate(values)]
    capture.counted.append(counted)
    capture.numbers[node] = items
    for e, size in enumerate(counted.sizes):
        capture.masks_of_symbol[expression(size)] = Mask(known.ids, e, ("N",))
    return ListVariable(list(items), mutation_type=ValueMutationNew())


def is_of_experts(counts: Counts) -> bool:
    """Whether each slot is counted, once, with an expert below `num_classes`."""
    ids = counts.ids
    if any(writers_of(storage_of(ids))) or not ids_are_below(ids, counts.num_classes):
        return False
    return not counts.reduced or ids_are_distinct(ids)


def _count(capture: Any, event: Event, node: fx.Node, known: Counts) -> Counted:
    shape_env, sizes = capture.output.shape_env, []
    with shape_env.ignore_fresh_unbacked_symbols():
        for _ in range(known.num_classes):
            sizes.append(shape_env.create_unbacked_symint())
            _constrain_range_for_size(sizes[-1])
    capture.forget_new_symbols()
    ends = accumulate(map(expression, sizes), initial=sympy.Integer(0))
    return Counted(event, node, known, tuple(sizes), tuple(ends))


def _as_variable(
    capture: Any, tx: Any, event: Event, tensor: TensorVariable, expert: int, value: Any
) -> VariableTracker:
    proxy = capture.output.create_proxy("call_function", expert_count, (tensor.as_proxy(), expert), {})
    tag(proxy.node, (event.number,), ())
    return SymNodeVariable.create(tx, proxy, value)


def expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)
