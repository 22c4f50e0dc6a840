"""How many slots each expert has, as Python numbers: `counts.tolist()`.

Dynamo cannot know them. They become numbers without a value, one an expert, that sum to the number of slots. Comparing
one with zero asks whether the expert has a token.
"""

from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.lists import ListVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size

from fx_passes.capture.events import Event, tag
from fx_passes.capture.index_list import past_call_without_arguments
from fx_passes.facts import Counts, Mask, fact
from fx_passes.ids import ids_are_below
from fx_passes.markers import expert_count
from fx_passes.ops import known_tensor


def read_counts(capture: Any, tx: Any, instruction: Any) -> bool:
    """`counts.tolist()`."""
    if instruction.argval != "tolist" or not tx.stack:
        return False
    tensor = tx.stack[-1].realize()
    if not isinstance(tensor, TensorVariable) or not isinstance(tensor.proxy, fx.Proxy):
        return False
    node = tensor.as_proxy().node
    known = fact(node)
    if not isinstance(known, Counts) or known.positive:
        return False
    if not ids_are_below(known.ids, known.num_classes):
        if known_tensor(known.ids).dim() == 2:  # one id a token is counted in much else than a layer of experts
            capture.reject(tx, "ids_are_in_range", "ids are counted that are not known to be those of an expert")
        return False
    after = past_call_without_arguments(tx)
    event = capture.event(tx, "counts of tokens")
    if after is None or capture.is_denied(event):
        return False
    numbers = _numbers(capture, known)
    items = [_as_variable(capture, tx, event, e, number) for e, number in enumerate(numbers)]
    for e, number in enumerate(numbers):
        capture.masks_of_symbol[_expression(number)] = Mask(known.ids, e, ("N",))
    tx.stack[-1] = ListVariable(items, mutation_type=ValueMutationNew())
    tx.instruction_pointer = after
    return True


def _numbers(capture: Any, known: Counts) -> list[Any]:
    """A symbol an expert, but for the last: it has what remains."""
    shape_env, total = capture.output.shape_env, known_tensor(known.ids).numel()
    numbers: list[Any] = []
    with shape_env.ignore_fresh_unbacked_symbols():
        for _ in range(known.num_classes - 1):
            number = shape_env.create_unbacked_symint()
            _constrain_range_for_size(number)
            numbers.append(number)
    numbers.append(total - sum(numbers))
    capture.forget_new_symbols()
    return numbers


def _as_variable(capture: Any, tx: Any, event: Event, expert: int, value: Any) -> VariableTracker:
    proxy = capture.output.create_proxy("call_function", expert_count, (tx.stack[-1].as_proxy(), expert), {})
    tag(proxy.node, (event.number,), ())
    return SymNodeVariable.create(tx, proxy, value)


def _expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)
