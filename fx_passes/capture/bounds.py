"""One tensor that says how many slots experts have becomes a number without a value, as those of a list (counts.py).

counts[e].item()    int((ids == e).sum())    rows[start:end], where `start` and `end` are tensors
"""

from typing import Any

import torch
from torch import fx
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.tensor import TensorVariable

from fx_passes.capture.counts import as_variable, counted_as, counted_by
from fx_passes.capture.events import Event, tag
from fx_passes.capture.variables import rank_of
from fx_passes.facts import is_made_of_counts, summed_mask
from fx_passes.facts.ids import num_columns
from fx_passes.facts.statements import Counts
from fx_passes.facts.totals import total_of
from fx_passes.graph.markers import expert_counts
from fx_passes.graph.ops import known_tensor


def item(capture: Any, tx: Any, tensor: Any) -> VariableTracker | None:
    """`tensor.item()`, if that is how many slots some experts have."""
    tensor = tensor.realize()
    if not _is_scalar(tensor):
        return None
    known = total_of(tensor.as_proxy().node)
    if known is None:
        return _sum_of_mask(capture, tx, tensor.as_proxy().node)
    counted = counted_by(capture, tx, known.node)
    return as_variable(capture, tx, counted, known.first, known.stop) if counted is not None else None


def _sum_of_mask(capture: Any, tx: Any, node: fx.Node) -> VariableTracker | None:
    """`(ids == e).sum().item()`, where the router chooses from so many experts that e is one of them."""
    mask = summed_mask(node)
    if mask is None or mask.slot is not None:
        return None
    expert, num_experts = mask.expert, num_columns(mask.ids)
    if isinstance(expert, fx.Node):
        _unroll(capture)
    elif num_experts is not None and 0 <= expert < num_experts:
        counts = Counts(mask.ids, num_experts, reduced=mask.reduced)
        counted = counted_as(capture, tx, counts, lambda event: _all_counts(capture, tx, counts, event))
        return as_variable(capture, tx, counted, expert, expert + 1) if counted is not None else None
    return None


def _all_counts(capture: Any, tx: Any, counts: Counts, event: Event) -> fx.Node:
    """The tensor that none of the code has, where it counts for each expert by itself."""
    ids = known_tensor(counts.ids)
    with tx.fake_mode:
        value = torch.empty(counts.num_classes, dtype=torch.int64, device=ids.device)
    arguments = (capture.proxy(counts.ids), counts.num_classes)
    proxy = capture.output.create_proxy("call_function", expert_counts, arguments, {})
    tag(proxy.node, (event.number,), ())
    return wrap_fx_proxy(tx, proxy, example_value=value).as_proxy().node


def build_slice(capture: Any, tx: Any, instruction: Any) -> bool:
    """`start:end`, where tensors say how many slots some experts have: they become numbers."""
    tx.stack[-instruction.arg :] = [as_bound(capture, tx, bound) for bound in tx.stack[-instruction.arg :]]
    return False


def as_bound(capture: Any, tx: Any, bound: VariableTracker) -> VariableTracker:
    """`bound` of a slice, as a number where it is a tensor of which one is known.

    An iteration that stands for all experts has none: each expert's rows begin somewhere else.
    """
    number = item(capture, tx, bound)
    if number is None and _is_scalar(bound.realize()):
        _unroll(capture)
        if is_made_of_counts(bound.as_proxy().node):
            detail = "rows are cut where it isn't known that the slots of an expert begin or end"
            capture.reject(tx, "segments_are_those_of_an_expert", detail)
    return number or bound


def _unroll(capture: Any) -> None:
    """Loops that are traced as one iteration have one an expert from now on."""
    loops = [scope.event for scope in capture.scopes if scope.event.can_be_unrolled]
    if loops:
        capture.trace_again_unrolled(loops)


def _is_scalar(variable: Any) -> bool:
    return isinstance(variable, TensorVariable) and isinstance(variable.proxy, fx.Proxy) and rank_of(variable) == 0
