"""A loop over all experts, traced as one iteration over an expert that has no value.

    for e in range(E):                        for e, expert in enumerate(experts):
    for expert in experts:                    for m, expert in zip(mask, experts):

The loop must run over as many experts as a router that came before it chooses from, and it is begun where `iter` is
called on a range or a ModuleList, or where `enumerate` or `zip` is and a loop over the result follows at once.
"""

from dataclasses import dataclass
from typing import Any

from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import ListVariable, RangeVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable

from fx_passes.capture.events import Scope
from fx_passes.capture.index_list import IndexListVariable
from fx_passes.capture.python_state import shows_all
from fx_passes.capture.stand_in import is_module_list, length_of, stand_in_for
from fx_passes.capture.variables import call_in_graph, open_number, unbound
from fx_passes.graph.markers import each_expert, mark_expert, select_expert

_FEWEST = 2
_DYNAMO = "torch._dynamo."


@dataclass(frozen=True)
class Zipped:
    """What `zip(*parts)` runs over."""

    parts: tuple[VariableTracker, ...]


Iterable = VariableTracker | Zipped


def begin_at_iter(capture: Any, tx: Any) -> bool:
    """`for e in range(E)`, `for expert in experts`: the iterable becomes a list of one symbolic expert.

    A loop of Dynamo's own, as in what it runs for `enumerate`, is part of one that was begun or is to be unrolled.
    """
    if str(tx.f_globals.get("__name__")).startswith(_DYNAMO):
        return False
    return _begin(capture, tx, tx.stack[-1].realize(), taken=1)


def call(capture: Any, tx: Any, instruction: Any) -> bool:
    """`enumerate(experts)` and `zip(mask, experts)` right before a loop over them: the call is done at once."""
    if instruction.arg < 1 or _following(tx).opname != "GET_ITER" or getattr(tx, "kw_names", None) is not None:
        return False
    contents = [item for item in tx.stack[-instruction.arg - 2 :] if type(item).__name__ != "NullVariable"]
    function, *arguments = (item.realize() for item in contents)
    kind = getattr(function, "fn", None)
    if kind not in (enumerate, zip) or (kind is enumerate and len(arguments) != 1):
        return False
    if kind is enumerate:
        length = _length(arguments[0])
        arguments = [*([RangeVariable([ConstantVariable.create(length)])] if length else []), *arguments]
    if not _begin(capture, tx, Zipped(tuple(arguments)), taken=instruction.arg + 2):
        return False
    tx.instruction_pointer += 1
    return True


def _begin(capture: Any, tx: Any, iterable: Iterable, taken: int) -> bool:
    """Puts a list of one element in place of the upper `taken` values of the stack; False where it is no such loop."""
    length, header = _length(iterable), _after_iter(tx)
    if length is None or length < _FEWEST or length not in capture.routers.widths or header is None:
        return False
    if capture.place_of(tx) in capture.memory.unrolled or not shows_all(tx):
        return False
    if tx.output.current_tracer is not tx.output.root_tracer:
        return False
    lists = [part for part in _parts(iterable) if is_module_list(part)]
    stand_ins = [stand_in_for(tx, part) for part in lists]
    if any(stand_in is None for stand_in in stand_ins):
        return False
    event = capture.event(tx, "expert loop")
    if capture.is_denied(event):
        return False
    event.can_be_unrolled = True
    number = _number(capture, tx, length)
    expert = number.as_proxy().node
    modules = [variable for _, variable in filter(None, stand_ins)]
    element = _element(tx, iterable, number, modules)
    tx.popn(taken)
    scope = Scope(event, tx, header, len(tx.stack), None, each=expert)
    scope.stand_ins.extend(stand_in for stand_in, _ in filter(None, stand_ins))
    capture.scopes.append(scope)
    tx.push(ListVariable([element], mutation_type=ValueMutationNew()))
    return True


def _parts(iterable: Iterable) -> tuple[VariableTracker, ...]:
    return iterable.parts if isinstance(iterable, Zipped) else (iterable,)


def _length(iterable: Iterable) -> int | None:
    """How many iterations there are, where that and each element are known."""
    if isinstance(iterable, Zipped):
        lengths = {_length(part) for part in iterable.parts}
        return lengths.pop() if len(lengths) == 1 else None
    if type(iterable) is RangeVariable:
        first, stop, step = (
            item.as_python_constant() if item.is_python_constant() else None for item in iterable.items
        )
        return stop if (first, step) == (0, 1) else None
    if isinstance(iterable, IndexListVariable):
        return None
    if isinstance(iterable, TensorVariable):
        value = iterable.as_proxy().node.meta["example_value"]
        return value.shape[0] if value.dim() and type(value.shape[0]) is int else None
    parts = unbound(iterable)
    if parts is not None:
        return len(iterable.items)
    return length_of(iterable) if is_module_list(iterable) else None


def _element(tx: Any, iterable: Iterable, number: VariableTracker, modules: list[VariableTracker]) -> VariableTracker:
    if isinstance(iterable, Zipped):
        return TupleVariable([_element(tx, part, number, modules) for part in iterable.parts])
    if isinstance(iterable, TensorVariable):
        return call_in_graph(tx, select_expert, iterable.as_proxy(), number.as_proxy(), 0, False)
    parts = unbound(iterable)
    if parts is not None:
        return call_in_graph(tx, select_expert, parts[0], number.as_proxy(), parts[1], False)
    return number if type(iterable) is RangeVariable else modules.pop(0)


def _number(capture: Any, tx: Any, length: int) -> VariableTracker:
    """The number of the expert that stands for `length` of them."""
    number = open_number(capture, tx, length, each_expert, length)
    node = number.as_proxy().node
    mark_expert(node, node)
    return number


def _after_iter(tx: Any) -> Any | None:
    """The header of the loop over the result, which begins with this instruction or the one behind it."""
    here = tx.instructions[tx.instruction_pointer]
    header = _following(tx, 1 if here.opname == "GET_ITER" else 2)
    return header if header.opname == "FOR_ITER" else None


def _following(tx: Any, count: int = 1) -> Any:
    """The instruction that is `count` behind the current one."""
    at = tx.instruction_pointer
    for _ in range(count):
        at += 1
        while tx.instructions[at].opname == "CACHE":
            at += 1
    return tx.instructions[at]
