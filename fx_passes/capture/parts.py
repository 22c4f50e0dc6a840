"""What an expert changes in Python may vanish if the expert has no token.

    if count == 0: continue
    outputs.append(expert(rows[start : start + count]))
    start += count

Where the expert is skipped, `start` is what it was, since zero was to be added, and `outputs` lacks a tensor without
rows: put together (`torch.cat`) it is the same. That is all that may be asked of such a list. The list may be one that
is being made, `[expert(part) for expert, part in zip(experts, parts) if len(part)]`.
"""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import ListVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size, statically_known_true

from fx_passes.capture.counts import Counted, counted_expression, expression
from fx_passes.capture.events import Scope, tag
from fx_passes.graph.markers import experts_hit


class PartsVariable(ListVariable):
    """A list that may lack tensors of experts without a token; `all_items` are those of all experts."""

    def __init__(self, items: list[VariableTracker], question: Callable[..., Any], **kwargs: Any) -> None:
        self.question = question
        super().__init__(items, **kwargs)

    @classmethod
    def become(cls, variable: ListVariable, question: Callable[[Any, str], Any]) -> None:
        """From now on `variable`, whoever holds it, is such a list. `question(tx, name)` answers what it is asked."""
        variable.__class__ = cls
        vars(variable)["question"] = question

    @property
    def all_items(self) -> list[VariableTracker]:
        return vars(self)["items"]

    @property
    def items(self) -> list[VariableTracker]:
        return self.question(None, "items")

    @items.setter
    def items(self, items: list[VariableTracker]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        vars(self)["items"] = items

    def sq_length(self, tx: Any) -> VariableTracker:
        return self.question(tx, "len")

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
        if name == "append" and len(args) == 1 and not kwargs:
            tx.output.side_effects.mutation(self)
            self.all_items.append(args[0])
            return ConstantVariable.create(None)
        return self.question(tx, "len" if name == "__len__" else name)

    def __repr__(self) -> str:
        return f"PartsVariable({len(self.all_items)} parts)"


def list_append(_capture: Any, tx: Any, instruction: Any) -> bool:
    """A list that is being made gets one item more."""
    parts = tx.stack[-1 - instruction.arg].realize()
    if not isinstance(parts, PartsVariable):
        return False
    parts.call_method(tx, "append", [tx.pop()], {})
    tx.instruction_pointer += 1
    return True


def vanishes(capture: Any, scope: Scope, name: str, before: Any, after: Any) -> bool:
    """Whether what changed in the stretch of `scope`, from `before` to `after`, does not if the expert has no token."""
    sizes, variable = _sizes_of_guard(capture, scope), _named(scope.tx, name)
    if not sizes or variable is None:
        return False
    numbers = _number(capture, before), _number(capture, after)
    if numbers[0] is not None and numbers[1] is not None:
        return (numbers[1] - numbers[0]).subs(dict.fromkeys(sizes, 0)) == 0
    return _grew_by_empty_tensors(capture, scope, variable.realize(), before, after, sizes)


def _named(tx: Any, name: str) -> VariableTracker | None:
    """What a snapshot calls `name`, where that is a local or on the stack."""
    kind, _, rest = name.partition(" ")
    if kind == "stack":
        return tx.stack[int(rest)]
    return tx.symbolic_locals.get(rest) if kind == "local" else None


def _sizes_of_guard(capture: Any, scope: Scope) -> list[sympy.Symbol]:
    """The numbers of rows that are zero where the stretch is skipped."""
    guard, masks = scope.guard, capture.masks_of_symbol.items()
    if guard is None or (scope.loop_over is not None and scope.experts is None):
        return []
    return [size for size, mask in masks if size.is_Symbol and mask.key == (guard.ids, guard.expert, guard.slot)]


def _number(capture: Any, description: Any) -> Any:
    """The number that a snapshot describes; None where it describes something else."""
    if description[0] == "constant" and description[2].removeprefix("-").isdigit():
        return sympy.Integer(int(description[2]))
    if description[0] != "node":
        return None
    value = description[1].meta.get("example_value")
    return expression(value) if isinstance(value, torch.SymInt) else counted_expression(capture, description[1])


def _grew_by_empty_tensors(
    capture: Any, scope: Scope, variable: VariableTracker, before: Any, after: Any, sizes: list[sympy.Symbol]
) -> bool:
    is_own = isinstance(variable, ListVariable) and isinstance(variable.mutation_type, ValueMutationNew)
    old, new = _described_items(before), _described_items(after)
    if not is_own or old is None or new is None or new[: len(old)] != old:
        return False
    added = [item.realize() for item in vars(variable)["items"][len(old) :]]
    counted = next((counted for counted in capture.counted if counted.size_symbols & set(sizes)), None)
    if counted is None or not all(_length(item) in sizes for item in added):
        return False
    if not isinstance(variable, PartsVariable):
        PartsVariable.become(variable, lambda tx, name: _answer(capture, tx, name, counted))
    return True


def _described_items(description: Any) -> tuple[Any, ...] | None:
    if description[0] not in (ListVariable.__name__, PartsVariable.__name__):
        return None
    return dict(description[1:])["items"]


def _length(item: VariableTracker) -> Any:
    if not isinstance(item, TensorVariable):
        return None
    value = item.as_proxy().node.meta["example_value"]
    return expression(value.shape[0]) if value.dim() > 0 else None


def _answer(capture: Any, tx: Any, name: str, counted: Counted) -> VariableTracker:
    """`len(outputs)`: the number of experts with a token, of which there is one at least where there is a token."""
    if name != "len" or not statically_known_true(counted.total > 0):
        detail = f"`{name}` of a list that lacks what experts without tokens would have added"
        capture.reject(capture.output.current_tx, "parts_are_only_put_together", detail)
        capture.trace_again_without([counted.event])
    shape_env = capture.output.shape_env
    with shape_env.ignore_fresh_unbacked_symbols():
        number = shape_env.create_unbacked_symint()
        _constrain_range_for_size(number, min=1, max=len(counted.sizes))
    capture.forget_new_symbols()
    proxy = capture.output.create_proxy("call_function", experts_hit, (capture.proxy(counted.node),), {})
    tag(proxy.node, (counted.event.number,), ())
    return SymNodeVariable.create(tx, proxy, number)
