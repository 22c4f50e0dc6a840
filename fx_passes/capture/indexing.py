"""Indexing by the expert of the iteration."""

from typing import Any

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import SliceVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable

from fx_passes.capture.events import Scope
from fx_passes.capture.index_list import index_by_tensors
from fx_passes.capture.stand_in import is_module_list, length_of, stand_in_for
from fx_passes.capture.variables import call_in_graph, expert_of_variable, is_full_slice, rank_of, unbound
from fx_passes.graph.markers import Expert, experts_of_each, index_with_expert, mark_expert, select_expert


def subscript(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`container[index]` where one of them is the expert of the iteration."""
    index_by_tensors(tx)
    container, index = tx.stack[-2].realize(), tx.stack[-1].realize()
    if isinstance(index, TupleVariable):
        return _by_tuple(capture, tx, container, index)
    expert = expert_of_variable(index)
    if expert is not None:
        return _by_expert(capture, tx, container, index, expert)
    expert = expert_of_variable(container)
    if expert is not None and index.is_python_constant() and index.as_python_constant() in (0, -1):
        result = wrap_fx_proxy(tx, container.as_proxy()[0])
        mark_expert(result.as_proxy().node, expert)
        return _finish(tx, result)
    return False


def unpack(_capture: Any, tx: Any, instruction: Any) -> bool:
    """`for (e,) in hit:`"""
    container = tx.stack[-1].realize()
    expert = expert_of_variable(container)
    if expert is not None and rank_of(container) == 1 and instruction.arg == 1:
        item = wrap_fx_proxy(tx, container.as_proxy()[0])
        mark_expert(item.as_proxy().node, expert)
        tx.stack[-1] = TupleVariable([item])
    return False


def _by_expert(capture: Any, tx: Any, container: Any, index: Any, expert: Expert) -> bool:
    if not capture.is_in_iteration_of(expert):
        return False
    keepdim = rank_of(index) == 1
    if isinstance(expert, int):
        is_slice = keepdim and isinstance(container, TensorVariable)
        tx.stack[-1] = _constant_slice(expert) if is_slice else ConstantVariable.create(expert)
        return False
    parts = unbound(container)
    if parts is not None:
        return _finish(tx, call_in_graph(tx, select_expert, parts[0], index.as_proxy(), parts[1], keepdim))
    if not isinstance(container, TensorVariable):
        loop = next(scope for scope in capture.scopes if scope.symbol is expert)
        return _finish(tx, _module_of(capture, tx, container, loop))
    return _finish(tx, call_in_graph(tx, select_expert, container.as_proxy(), index.as_proxy(), 0, keepdim))


def _module_of(capture: Any, tx: Any, experts: Any, loop: Scope) -> VariableTracker:
    """`experts[e]`: a stand-in for all, where they are alike and as many as the loop has iterations."""
    fits = is_module_list(experts) and (loop.each is None or experts_of_each(loop.each) == length_of(experts))
    made = stand_in_for(tx, experts) if fits else None
    if made is None:
        capture.trace_again_unrolled([loop.event])
    stand_in, variable = made
    loop.event.can_be_unrolled = True
    loop.stand_ins.append(stand_in)
    return variable


def _by_tuple(capture: Any, tx: Any, container: Any, index: TupleVariable) -> bool:
    items = [item.realize() for item in index.items]
    marked = [place for place, item in enumerate(items) if expert_of_variable(item) is not None]
    if len(marked) != 1 or not isinstance(container, TensorVariable):
        return False
    place = marked[0]
    expert, rank = expert_of_variable(items[place]), rank_of(items[place])
    if not capture.is_in_iteration_of(expert):
        return False
    if isinstance(expert, int):
        if rank == 0:
            tx.stack[-1] = TupleVariable([*items[:place], ConstantVariable.create(expert), *items[place + 1 :]])
        return False
    if all(is_full_slice(item) for at, item in enumerate(items) if at != place):
        selected = call_in_graph(tx, select_expert, container.as_proxy(), items[place].as_proxy(), place, rank == 1)
        return _finish(tx, selected)
    if rank == 0:
        return _finish(tx, call_in_graph(tx, index_with_expert, container.as_proxy(), index.as_proxy(), place))
    return False


def _finish(tx: Any, result: VariableTracker) -> bool:
    tx.popn(2)
    tx.push(result)
    tx.instruction_pointer += 1
    return True


def _constant_slice(start: int) -> SliceVariable:
    return SliceVariable([ConstantVariable.create(value) for value in (start, start + 1, None)])
