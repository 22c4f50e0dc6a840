"""The rows of one expert, cut out of rows that lie expert by expert: `rows[start:end]`, `rows.split(counts)`.

Their number is that of the expert's slots, which has no value (counts.py). Put together again (`torch.cat`), the
segments of all experts are as many rows as there are slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import BaseListVariable, SliceVariable, TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from fx_passes.capture.bounds import as_bound
from fx_passes.capture.counts import Counted, expression
from fx_passes.capture.events import tag
from fx_passes.capture.parts import PartsVariable
from fx_passes.capture.variables import rank_of
from fx_passes.facts.ids import listings_of_gates
from fx_passes.graph.markers import expert_cat, expert_places, expert_segment
from fx_passes.graph.ops import known_tensor, same_size


def subscript(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`rows[start:end]`, also `rows[start:end, None]`."""
    if not capture.counted:
        return False
    container, index = tx.stack[-2].realize(), tx.stack[-1].realize()
    first = index.items[0].realize() if isinstance(index, TupleVariable) and index.items else index
    if not isinstance(container, TensorVariable) or not isinstance(first, SliceVariable):
        return False
    segment = _between(capture, tx, container, *first.items)
    if segment is None:
        return False
    if first is not index:
        everything = SliceVariable([ConstantVariable.create(None) for _ in range(3)])
        tx.stack[-2], tx.stack[-1] = segment, TupleVariable([everything, *index.items[1:]])
        return False
    tx.popn(2)
    tx.push(segment)
    tx.instruction_pointer += 1
    return True


def binary_slice(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`rows[start:end]` where that is one instruction."""
    container = tx.stack[-3].realize()
    if not isinstance(container, TensorVariable):
        return False
    segment = _between(capture, tx, container, *_ends(capture, tx))
    if segment is None:
        return False
    tx.popn(3)
    tx.push(segment)
    tx.instruction_pointer += 1
    return True


def store_slice(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`rows[start:end] = value` where that is one instruction: as one by an index."""
    if not isinstance(tx.stack[-3].realize(), TensorVariable):
        return False
    ends = _ends(capture, tx)
    tx.popn(2)
    tx.push(SliceVariable(ends, tx=tx))
    index_by_places(capture, tx)
    value, container, index = tx.popn(3)
    container.call_method(tx, "__setitem__", [index, value], {})
    tx.instruction_pointer += 1
    return True


def _ends(capture: Any, tx: Any) -> list[VariableTracker]:
    """Where the slice on top of the stack begins, where it ends, and its step."""
    ends = [as_bound(capture, tx, end) for end in tx.stack[-2:]]
    return [*ends, ConstantVariable.create(None)]


def index_by_places(capture: Any, tx: Any) -> None:
    """`rows[start:end]`, about to be written: the rows of an expert are named one by one."""
    container, index = tx.stack[-2].realize(), tx.stack[-1].realize()
    if not isinstance(container, TensorVariable) or not isinstance(index, SliceVariable):
        return
    found = _expert_between(capture, container, *index.items)
    if found is None:
        return
    counted, expert = found
    with tx.fake_mode:
        places = torch.empty(counted.sizes[expert], dtype=torch.int64, device=known_tensor(counted.node).device)
    arguments = (capture.proxy(counted.node), expert)
    proxy = capture.output.create_proxy("call_function", expert_places, arguments, {})
    tag(proxy.node, (counted.event.number,), ())
    tx.stack[-1] = wrap_fx_proxy(tx, proxy, example_value=places)


def _between(
    capture: Any, tx: Any, rows: TensorVariable, start: VariableTracker, stop: VariableTracker, step: VariableTracker
) -> VariableTracker | None:
    found = _expert_between(capture, rows, start, stop, step)
    return _segment(capture, tx, rows, *found) if found is not None else None


def _expert_between(
    capture: Any, rows: TensorVariable, start: VariableTracker, stop: VariableTracker, step: VariableTracker
) -> tuple[Counted, int] | None:
    """The expert whose rows a slice takes, out of those of all slots."""
    first, last = _number(start, 0), _number(stop, None)
    if first is None or last is None or _number(step, 1) != 1:
        return None
    for counted in capture.counted:
        expert = counted.expert_between(first, last)
        if expert is not None and _has_a_row_for_each_slot(rows, counted):
            return counted, expert
    return None


def split(
    capture: Any, tx: Any, rows: TensorVariable, args: Sequence[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """`rows.split(counts, dim=0)`: a tuple of segments."""
    given = dict(zip(("split_size", "dim"), args, strict=False)) | kwargs
    dim = given.get("dim", ConstantVariable.create(0))
    counted = _counted(capture, _numbers(given.get("split_size", given.get("split_size_or_sections"))))
    if counted is None or _number(dim, None) != 0 or not _has_a_row_for_each_slot(rows, counted):
        return None
    return TupleVariable([_segment(capture, tx, rows, counted, expert) for expert in range(len(counted.sizes))])


def total(
    capture: Any, tx: Any, args: Sequence[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """`sum(counts)`: the number of slots."""
    counted = _counted(capture, _numbers(args[0])) if len(args) == 1 and not kwargs else None
    if counted is None or listings_of_gates(counted.counts.ids):
        return None
    ids = capture.proxy(counted.counts.ids)
    return SymNodeVariable.create(tx, capture.output.create_proxy("call_method", "numel", (ids,), {}), counted.total)


def cat(
    capture: Any, tx: Any, args: Sequence[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """`torch.cat(parts)` of what was computed from the segments of all experts in turn."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    parts = given.pop("tensors", None)
    dim = _number(given.pop("dim", given.pop("axis", ConstantVariable.create(0))), None)
    items = _items(parts)
    if given or dim != 0 or not all(isinstance(item, TensorVariable) and rank_of(item) for item in items):
        return None
    proxies = [item.as_proxy() for item in items]
    counted = _counted(capture, [proxy.node.meta["example_value"].shape[0] for proxy in proxies])
    if counted is None:
        return None
    with tx.fake_mode:
        value = torch.cat([proxy.node.meta["example_value"] for proxy in proxies])
        value = value.index_select(0, value.new_empty((counted.total,), dtype=torch.int64))
    proxy = capture.output.create_proxy("call_function", expert_cat, (proxies, capture.proxy(counted.node)), {})
    tag(proxy.node, (counted.event.number,), ())
    return wrap_fx_proxy(tx, proxy, example_value=value)


def _segment(capture: Any, tx: Any, rows: TensorVariable, counted: Counted, expert: int) -> VariableTracker:
    value = rows.as_proxy().node.meta["example_value"]
    with tx.fake_mode:
        value = value.index_select(0, value.new_empty((counted.sizes[expert],), dtype=torch.int64))
    arguments = (rows.as_proxy(), capture.proxy(counted.node), expert)
    proxy = capture.output.create_proxy("call_function", expert_segment, arguments, {})
    tag(proxy.node, (counted.event.number,), ())
    return wrap_fx_proxy(tx, proxy, example_value=value)


def _has_a_row_for_each_slot(rows: TensorVariable, counted: Counted) -> bool:
    return rank_of(rows) > 0 and same_size(rows.as_proxy().node.meta["example_value"].shape[0], counted.total)


def _counted(capture: Any, numbers: Sequence[Any]) -> Counted | None:
    """The counts that `numbers` are, from the first expert's to the last one's."""
    expressions = [expression(number) for number in numbers if isinstance(number, (int, torch.SymInt))]
    for counted in capture.counted:
        if len(numbers) == len(expressions) and expressions == [expression(size) for size in counted.sizes]:
            return counted
    return None


def _items(variable: Any) -> list[VariableTracker]:
    variable = variable.realize() if isinstance(variable, VariableTracker) else None
    if isinstance(variable, PartsVariable):
        return variable.all_items
    return [item.realize() for item in variable.items] if isinstance(variable, BaseListVariable) else []


def _numbers(variable: Any) -> list[Any]:
    return [_number(item, None) for item in _items(variable)]


def _number(variable: VariableTracker, absent: int | None) -> int | torch.SymInt | None:
    """The number that `variable` is, `absent` where it is None; None where it is anything else."""
    variable = variable.realize()
    if isinstance(variable, SymNodeVariable):
        return variable.sym_num if isinstance(variable.sym_num, torch.SymInt) else None
    value = variable.as_python_constant() if variable.is_python_constant() else absent
    return absent if value is None else value if type(value) is int else None
