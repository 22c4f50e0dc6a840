"""`for e in hit:` where `hit` lists the experts that have a token; the begin and the end of every loop."""

from typing import Any

from torch import fx
from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from fx_passes.capture import counts, expert_loops
from fx_passes.capture.events import Scope, events_of
from fx_passes.capture.index_list import IndexListVariable
from fx_passes.capture.parts import vanishes
from fx_passes.capture.python_state import Snapshot, difference, said_of, snapshot
from fx_passes.capture.stand_in import replace_parameters
from fx_passes.capture.variables import expert_of_variable, has_open_length, open_number, rank_of
from fx_passes.facts import fact
from fx_passes.facts.ids import classes_that_occur
from fx_passes.facts.statements import Hit
from fx_passes.facts.totals import total_of
from fx_passes.graph.markers import current_expert, mark_expert, place_among_hits
from fx_passes.graph.ops import fake_tensor


def get_iter(capture: Any, tx: Any, _instruction: Any) -> bool:
    """The loop begins: what it runs over becomes a list of one symbolic expert, or of all experts."""
    is_list = isinstance(tx.stack[-1].realize(), IndexListVariable)
    if not is_list and expert_loops.begin_at_iter(capture, tx):
        return False
    hit = tx.stack.pop().realize()
    header = tx.instructions[tx.instruction_pointer + 1]
    numbers = iterate(capture, tx, hit.tensor, header) if is_list else counts.iterate(capture, tx, hit, header)
    tx.push(numbers or hit)
    if numbers is not None or not isinstance(hit, TensorVariable) or not has_open_length(hit):
        return False
    tx.stack[-1] = _experts(capture, tx, hit, header, len(tx.stack) - 1) or hit
    return False


def _experts(capture: Any, tx: Any, hit: TensorVariable, header: Any, stack_size: int) -> ListVariable | None:
    """What a loop over `hit` runs over: one symbolic expert, or all experts; None where it is Dynamo's to say."""
    classes = fact(hit.as_proxy().node)
    if not isinstance(classes, Hit) or classes.as_tuple or header.opname != "FOR_ITER":
        detail = "the loop runs over a tensor that is not known to list the experts with a token"
        capture.reject(tx, "loop_is_over_the_hit_experts", detail)
        return None
    if not capture.shows_all(tx):
        return None
    event = capture.event(tx, "hit loop")
    if capture.is_denied(event):
        return None
    is_unrolled = event.place in capture.memory.unrolled
    experts = range(classes_that_occur(classes.ids, classes.num_classes)) if is_unrolled else (None,)
    items = [_iteration_expert(capture, tx, hit, expert) for expert in experts]
    event.symbol = None if is_unrolled else items[0].as_proxy().node
    capture.scopes.append(Scope(event, tx, header, stack_size, None, loop_over=classes))
    return ListVariable(items, mutation_type=ValueMutationNew())


def enumerated(capture: Any, tx: Any, listed: VariableTracker, header: Any) -> VariableTracker | None:
    """`for i, e in enumerate(hit):`, or over such a list, with the loop header `header`.

    Experts without tokens are not counted, so `i` has no value.
    """
    listed = listed.realize()
    if isinstance(listed, IndexListVariable):
        hit, experts = listed.tensor, iterate(capture, tx, listed.tensor, header)
    elif isinstance(listed, TensorVariable) and has_open_length(listed):
        hit, experts = listed, _experts(capture, tx, listed, header, len(tx.stack))
    else:
        return None
    if experts is None:
        return None
    known = fact(hit.as_proxy().node)
    assert isinstance(known, Hit)
    pairs = [
        TupleVariable([open_number(capture, tx, known.num_classes, place_among_hits, hit.as_proxy()), expert])
        for expert in experts.items
    ]
    return ListVariable(pairs, mutation_type=ValueMutationNew())


def subscript(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`experts[i]` with such a number, which Dynamo cannot do."""
    index = tx.stack[-1].realize()
    if isinstance(index, SymNodeVariable) and index.as_proxy().node.target is place_among_hits:
        detail = "an expert's place among those with a token is taken for the number of an expert"
        capture.reject(tx, "loop_is_over_the_hit_experts", detail)
    return False


def iterate(capture: Any, tx: Any, hit: TensorVariable, header: Any) -> ListVariable | None:
    """`for e in hit.tolist():`, or over such a list, with the loop header `header`: the numbers of all experts.

    Iterations may be missing: they belong to experts without tokens.
    """
    classes = fact(hit.as_proxy().node)
    if not isinstance(classes, Hit) or classes.as_tuple or rank_of(hit) != 1:
        return None
    event = capture.event(tx, "hit loop")
    if capture.is_denied(event):
        return None
    numbers = range(classes_that_occur(classes.ids, classes.num_classes))
    scope = Scope(event, tx, header, len(tx.stack), None, loop_over=classes, experts=iter(numbers))
    capture.scopes.append(scope)
    return ListVariable(list(map(ConstantVariable.create, numbers)), mutation_type=ValueMutationNew())


def _iteration_expert(capture: Any, tx: Any, hit: TensorVariable, expert: int | None) -> VariableTracker:
    proxy = capture.output.create_proxy("call_function", current_expert, (hit.as_proxy(),), {})
    variable = wrap_fx_proxy(tx, proxy)
    mark_expert(proxy.node, proxy.node if expert is None else expert)
    return variable


def for_iter(capture: Any, tx: Any, instruction: Any) -> bool:
    """Back at a loop header: what was assumed since must have left Python's state as it was."""
    for scope in [scope for scope in capture.scopes if scope.tx is tx and scope.header is instruction]:
        now = snapshot(tx, instruction, scope.stack_size)
        if scope.before is not None:
            _compare(capture, scope, scope.before, now)
        scope.before = now
        if scope.is_loop:
            _next_iteration(capture, scope)
        else:
            capture.scopes.remove(scope)
    return False


def _next_iteration(capture: Any, scope: Scope) -> None:
    if scope.experts is not None:
        number = next(scope.experts, None)
        if number is None:
            capture.scopes.remove(scope)
        else:
            scope.begin_iteration(number)
        return
    iterator = scope.tx.stack[-1].realize()
    if iterator.index >= len(iterator.items):
        _end(capture, scope)
    elif scope.loop_over is not None:
        item = iterator.items[iterator.index]
        expert = expert_of_variable(item.items[1] if isinstance(item, TupleVariable) else item)
        assert expert is not None
        scope.begin_iteration(expert)


def _end(capture: Any, scope: Scope) -> None:
    capture.scopes.remove(scope)
    for stand_in in scope.stand_ins:
        assert scope.symbol is not None
        capture.stand_ins.append((stand_in, scope.event))
        if not replace_parameters(scope.tx, stand_in, scope.symbol):
            capture.trace_again_unrolled([scope.event])


def _is_number(node: fx.Node, *, is_new: bool) -> bool:
    """Whether a live local holds a number; a tensor that counts slots is one where it is counted on."""
    return fake_tensor(node) is None or (not is_new and total_of(node) is not None)


def _compare(capture: Any, scope: Scope, before: Snapshot, now: Snapshot) -> None:
    """A tensor that a live local holds may change only to one that was computed in the loop, and so dies with it.

    Numbers of slots stay in the expressions of other numbers.
    """
    changed = difference(before, now)
    from_outside = [name for name, _, node in changed.carried if scope.event.number not in events_of(node)]
    numbers = [name for name, old, node in changed.carried if _is_number(node, is_new=old is None)]
    unexplained = dict.fromkeys((*changed.names, *from_outside, *numbers))
    names = [
        said_of(name)
        for name in unexplained
        if name not in before or not vanishes(capture, scope, name, before[name], now[name])
    ]
    if names and scope.event.can_be_unrolled:
        capture.trace_again_unrolled([scope.event])
    if names:
        scope.event.failed = True
        detail = f"running the loop body changes {', '.join(dict.fromkeys(names))}"
        capture.reject(scope.tx, "loop_changes_no_python_state", detail)
    if scope.symbol is not None:
        scope.symbol.meta["scatter_moe_carried"] = [(old, new) for _, old, new in changed.carried]
