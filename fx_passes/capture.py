"""Capturing naive loops that Dynamo cannot trace on its own.

Dynamo gives up at three places of a naive loop: at `nonzero()` and its kin, at `for e in hit`, and at `if mask.any()`. While a frame is
traced for our backend each such place is an *event*: tracing goes on under an assumption, and the nodes traced under it carry its number.

    dynamic op     the output's length is left open
    hit loop       one iteration stands for all, over an expert without a value; or one iteration per class where a ModuleList is indexed
    empty branch   the side that handles a token is taken; the other side must go straight to the loop's next iteration

After the rewrite every event must be *dissolved*: all its nodes were replaced. Otherwise the frame is traced again with the event denied, which
is to say as Dynamo alone does it. So nothing that was assumed ever runs.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis
from torch._dynamo.variables.base import ValueMutationNew
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import BaseListVariable, ListVariable, SliceVariable, TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import CompileContext
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fx_passes.emptiness import nonempty_question
from fx_passes.facts import Hit, Rows, Selection, fact
from fx_passes.markers import Expert, current_expert, expert_of, index_list, index_with_expert, mark_expert, select_expert
from fx_passes.ops import arg, op_name
from fx_passes.python_state import Snapshot, difference, snapshot
from fx_passes.region import Rejection
from fx_passes.report import record_rejections, source_line

_ROUTING = frozenset(("topk", "one_hot", "argmax", "sort", "argsort", "scatter", "scatter_", "bincount", "histc"))
_EVENTS = "scatter_moe_events"
_GUARDS = "scatter_moe_guards"
_STRAIGHT = frozenset(("NOP", "CACHE", "EXTENDED_ARG", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "NOT_TAKEN"))


class TraceAgain(TensorifyScalarRestartAnalysis):
    """Restarts the analysis of the frame. Dynamo lets only this class of restart pass through a backend."""


def events_of(node: fx.Node) -> tuple[int, ...]:
    """Numbers of the events under which `node` was traced."""
    return node.meta.get(_EVENTS, ())


def guards_of(node: fx.Node) -> tuple[tuple[fx.Node, Expert], ...]:
    """(ids, expert) for each assumption "this expert has a token" under which `node` was traced."""
    return node.meta.get(_GUARDS, ())


@dataclass
class Memory:
    """What restarts of one frame hand on to each other."""

    denied: set[int] = field(default_factory=set)
    unrolled: set[int] = field(default_factory=set)
    reported: set[Rejection] = field(default_factory=set)
    errors: int = 0

    @classmethod
    def of_current_frame(cls) -> "Memory":
        context = CompileContext.get()
        if not hasattr(context, "scatter_moe"):
            context.scatter_moe = cls()  # pyright: ignore[reportAttributeAccessIssue]
        return context.scatter_moe  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class Event:
    number: int
    kind: str
    location: tuple[str, int]
    routed: bool
    failed: bool = False


@dataclass
class Scope:
    """A stretch of the trace that rests on one event: up to the next visit of the loop header `header` in `tx`.

    `guard` is what is assumed in it: (ids, expert), that the expert has a token. `loop_over` are the ids of a hit loop.
    """

    event: Event
    tx: Any
    header: Any
    stack_size: int
    before: Snapshot | None
    guard: tuple[fx.Node, Expert] | None = None
    loop_over: fx.Node | None = None

    @property
    def symbol(self) -> fx.Node | None:
        """The symbolic expert of a hit loop that is captured as one iteration."""
        return self.guard[1] if self.loop_over is not None and self.guard is not None and isinstance(self.guard[1], fx.Node) else None


class Capture:
    """The events of one attempt at tracing one frame."""

    def __init__(self, output: Any) -> None:
        self.output = output
        self.memory = Memory.of_current_frame()
        self.events: list[Event] = []
        self._scopes: list[Scope] = []
        self._masks_of_symbol: dict[Any, Any] = {}
        self._last_node: dict[fx.Graph, fx.Node | None] = {}
        self._stock_allows_dynamic = output.shape_env.allow_dynamic_output_shape_ops
        self._unbacked_seen = output.shape_env.unbacked_symint_counter
        self._handlers: dict[str, Callable[[Any, Any], bool]] = {
            "GET_ITER": self._get_iter,
            "FOR_ITER": self._for_iter,
            "BINARY_SUBSCR": self._subscript,
            "LOAD_METHOD": self._index_list,
            "LOAD_ATTR": self._index_list,
        }

    def step(self, tx: Any, original: Callable[[Any], bool]) -> bool:
        """One instruction of `tx`, with what Dynamo cannot do replaced by an assumption."""
        pointer = tx.instruction_pointer
        if pointer is None:
            return original(tx)
        instruction = tx.instructions[pointer]
        handler = self._handlers.get(instruction.opname)
        if handler is None and "JUMP" in instruction.opname and "IF" in instruction.opname:
            handler = self._jump
        if handler is not None and handler(tx, instruction):
            self._tag_new_nodes(tx)
            return True
        self._allow_dynamic_op()
        try:
            return original(tx)
        except RestartAnalysis:
            raise
        except Exception as error:
            self._trace_again_without_assumptions(tx, error)
            raise
        finally:
            self._tag_new_nodes(tx)

    def leftover(self, erased: set[int], remaining: set[int]) -> list[Event]:
        """Events that the rewrite did not dissolve."""
        return [
            event
            for event in self.events
            if event.number not in self.memory.denied and (event.failed or event.number not in erased or event.number in remaining)
        ]

    def trace_again_without(self, event: Event) -> None:
        self.memory.denied.add(event.number)
        self._restart(f"{event.kind} at {event.location[0]}:{event.location[1]} was not part of a rewritten region")

    def _restart(self, reason: str) -> None:
        self.output.root_tx.speculation_log.clear()
        raise TraceAgain(restart_reason=f"scatter_moe: {reason}")

    def _trace_again_without_assumptions(self, tx: Any, error: Exception) -> None:
        """Under an assumption tracing failed where Dynamo alone may not: first the last assumption is dropped, then all."""
        live = [event for event in self.events if event.number not in self.memory.denied]
        if tx.parent is not None or not live:
            return
        self.memory.errors += 1
        dropped = live[-1:] if self.memory.errors == 1 else live
        self.memory.denied.update(event.number for event in dropped)
        self._restart(f"{type(error).__name__} while tracing: {error}")

    def _event(self, tx: Any, kind: str) -> Event:
        frame = tx.frame_summary()
        event = Event(len(self.events), kind, (frame.filename, frame.lineno or 0), self._has_routing())
        self.events.append(event)
        return event

    def _reject(self, tx: Any, rule: str, detail: str) -> None:
        """Says why a place that looks like part of an expert loop is left to Dynamo."""
        if self._has_routing():
            frame = tx.frame_summary()
            rejection = Rejection(rule, detail, source_line(frame.filename, frame.lineno or 0))
            record_rejections([rejection], self.memory.reported)

    def _has_routing(self) -> bool:
        """Whether the graph so far holds what a router computes: only then is a place worth a word."""
        return any(op_name(node) in _ROUTING for node in self.output.graph.nodes)

    def _is_denied(self, event: Event) -> bool:
        return event.number in self.memory.denied

    # -- dynamic ops ---------------------------------------------------------------------------------------------------------------------

    def _allow_dynamic_op(self) -> None:
        allowed = self._stock_allows_dynamic or len(self.events) not in self.memory.denied
        shape_env = self.output.shape_env
        if shape_env.allow_dynamic_output_shape_ops != allowed:
            shape_env.settings = dataclasses.replace(shape_env.settings, allow_dynamic_output_shape_ops=allowed)

    def _tag_new_nodes(self, tx: Any) -> None:
        nodes = self._new_nodes(self.output.current_tracer.graph)
        counter = self.output.shape_env.unbacked_symint_counter
        numbers = tuple(scope.event.number for scope in self._scopes)
        if counter != self._unbacked_seen:
            self._unbacked_seen = counter
            if not self._stock_allows_dynamic:
                numbers = (*numbers, self._event(tx, "dynamic op").number)
            for node in nodes:
                self._note_selection(node)
        if numbers:
            for node in nodes:
                node.meta[_EVENTS] = tuple(dict.fromkeys((*events_of(node), *numbers)))
                node.meta[_GUARDS] = tuple(scope.guard for scope in self._scopes if scope.guard is not None)

    def _new_nodes(self, graph: fx.Graph) -> list[fx.Node]:
        last = self._last_node.get(graph)
        nodes = []
        node = graph._root.prev
        while node is not last and node is not graph._root:
            nodes.append(node)
            node = node.prev
        self._last_node[graph] = graph._root.prev
        return nodes

    def _note_selection(self, node: fx.Node) -> None:
        selection = fact(node)
        if not isinstance(selection, Selection):
            return
        value = node.meta["example_value"]
        length = (value[0] if isinstance(value, (tuple, list)) else value).shape[0]
        if isinstance(length, torch.SymInt):
            self._masks_of_symbol[length.node.expr] = selection.mask

    # -- hit loops -----------------------------------------------------------------------------------------------------------------------

    def _get_iter(self, tx: Any, instruction: Any) -> bool:
        hit = tx.stack[-1].realize()
        if not isinstance(hit, TensorVariable) or not _has_open_length(hit):
            return False
        classes = fact(hit.as_proxy().node)
        header = tx.instructions[tx.instruction_pointer + 1]
        if not isinstance(classes, Hit) or header.opname != "FOR_ITER":
            self._reject(tx, "loop_is_over_the_hit_experts", "the loop runs over a tensor that is not known to list the experts with a token")
            return False
        event = self._event(tx, "hit loop")
        if self._is_denied(event):
            return False
        unrolled = event.number in self.memory.unrolled
        experts = range(classes.num_classes) if unrolled else (None,)
        items = [self._iteration_expert(tx, hit, expert) for expert in experts]
        tx.stack[-1] = ListVariable(items, mutation_type=ValueMutationNew())
        self._scopes.append(Scope(event, tx, header, len(tx.stack) - 1, None, loop_over=classes.ids))
        return False

    def _iteration_expert(self, tx: Any, hit: TensorVariable, expert: int | None) -> TensorVariable:
        proxy = self.output.create_proxy("call_function", current_expert, (hit.as_proxy(),), {})
        variable = wrap_fx_proxy(tx, proxy)
        mark_expert(proxy.node, proxy.node if expert is None else expert)
        return variable

    def _for_iter(self, tx: Any, instruction: Any) -> bool:
        """Back at a loop header: what was assumed since must have left Python's state as it was."""
        for scope in [scope for scope in self._scopes if scope.tx is tx and scope.header is instruction]:
            now = snapshot(tx, instruction, scope.stack_size)
            if scope.before is not None:
                self._compare(scope, now)
            scope.before = now
            if scope.loop_over is None:
                self._scopes.remove(scope)
            else:
                self._next_iteration(scope)
        return False

    def _next_iteration(self, scope: Scope) -> None:
        iterator = scope.tx.stack[-1].realize()
        assert scope.loop_over is not None
        if iterator.index >= len(iterator.items):
            self._scopes.remove(scope)
            return
        expert = _expert_of_variable(iterator.items[iterator.index])
        assert expert is not None
        scope.guard = (scope.loop_over, expert)

    def _compare(self, scope: Scope, now: Snapshot) -> None:
        assert scope.before is not None
        changed = difference(scope.before, now)
        if changed.names:
            scope.event.failed = True
            detail = f"running the loop body changes {', '.join(changed.names)}"
            self._reject(scope.tx, "loop_changes_no_python_state", detail)
        if scope.symbol is not None:
            scope.symbol.meta["scatter_moe_carried"] = changed.carried

    # -- branches ------------------------------------------------------------------------------------------------------------------------

    def _jump(self, tx: Any, instruction: Any) -> bool:
        value = tx.stack[-1].realize()
        if not isinstance(value, (TensorVariable, SymNodeVariable)) or not isinstance(value.proxy, fx.Proxy):
            return False
        truth = self._sentinel_truth(value.as_proxy().node)
        if truth is not None:
            expert, truth = truth
            if type(expert) is int or self._skips_to_header(tx, instruction, truth):
                tx.stack[-1] = ConstantVariable.create(truth)
            return False
        question = nonempty_question(value, self._masks_of_symbol)
        header = self._skips_to_header(tx, instruction, question.truth) if question is not None else None
        if question is None or header is None:
            self._reject_branch(tx, value)
            return False
        event = self._event(tx, "empty branch")
        if self._is_denied(event):
            return False
        tx.stack[-1] = ConstantVariable.create(question.truth)
        size = len(tx.stack) - 2
        guard = (question.mask.ids, question.mask.expert)
        self._scopes.append(Scope(event, tx, header, size, snapshot(tx, header, size), guard))
        return False

    def _reject_branch(self, tx: Any, value: Any) -> None:
        if isinstance(value, TensorVariable) or _is_open(value.sym_num):
            self._reject(tx, "guards_only_skip_empty_experts", "a branch on data does something other than to skip an expert without tokens")

    def _sentinel_truth(self, node: fx.Node) -> tuple[int | fx.Node, bool] | None:
        """`if e == num_experts`: known where the loop was unrolled, false by assumption where it was not (`e` is then no such class)."""
        name = op_name(node)
        if name not in ("eq", "ne", "ge"):
            return None
        expert, other = expert_of(node.args[0]), arg(node, 1, "other")
        if expert is None or type(other) is not int:
            return None
        if isinstance(expert, int):
            return expert, {"eq": expert == other, "ne": expert != other, "ge": expert >= other}[name]
        excluded = expert.meta.setdefault("scatter_moe_excluded", {})
        excluded[other] = "ge" if name == "ge" else "eq"
        return expert, name == "ne"

    def _skips_to_header(self, tx: Any, instruction: Any, truth: bool) -> Any | None:
        """The header of the innermost loop, where the side that is not taken goes to it without doing anything."""
        jumps_on = "IF_TRUE" in instruction.opname
        taken_is_target = truth == jumps_on
        skipped = tx.instructions[tx.instruction_pointer + 1] if taken_is_target else instruction.target
        index = tx.indexof[skipped]
        for _ in range(len(tx.instructions)):
            current = tx.instructions[index]
            if current.opname == "FOR_ITER":
                return current
            if current.opname not in _STRAIGHT:
                return None
            index = tx.indexof[current.target] if current.target is not None else index + 1
        return None

    # -- lists of row positions -----------------------------------------------------------------------------------------------------------

    def _index_list(self, tx: Any, instruction: Any) -> bool:
        """`tokens.tolist()`: goes on with the tensor, which indexes as the list does."""
        if instruction.argval != "tolist" or not tx.stack:
            return False
        indices = tx.stack[-1].realize()
        if not isinstance(indices, TensorVariable) or not isinstance(fact(indices.as_proxy().node), Rows):
            return False
        after = _past_call_without_arguments(tx)
        event = self._event(tx, "index list")
        if after is None or self._is_denied(event):
            return False
        proxy = self.output.create_proxy("call_function", index_list, (indices.as_proxy(),), {})
        tx.stack[-1] = wrap_fx_proxy(tx, proxy)
        proxy.node.meta[_EVENTS] = (event.number,)
        tx.instruction_pointer = after
        return True

    # -- indexing by the expert ----------------------------------------------------------------------------------------------------------

    def _subscript(self, tx: Any, instruction: Any) -> bool:
        container, index = tx.stack[-2].realize(), tx.stack[-1].realize()
        if isinstance(index, BaseListVariable):
            return self._subscript_by_tuple(tx, container, index)
        expert = _expert_of_variable(index)
        if expert is not None:
            return self._subscript_by_expert(tx, container, index, expert)
        expert = _expert_of_variable(container)
        if expert is not None and index.is_python_constant() and index.as_python_constant() in (0, -1):
            result = wrap_fx_proxy(tx, container.as_proxy()[0])
            mark_expert(result.as_proxy().node, expert)
            return self._replace_subscript(tx, result)
        return False

    def _subscript_by_expert(self, tx: Any, container: Any, index: TensorVariable, expert: int | fx.Node) -> bool:
        keepdim = _rank(index) == 1
        if isinstance(expert, int):
            is_slice = keepdim and isinstance(container, TensorVariable)
            tx.stack[-1] = _constant_slice(expert) if is_slice else ConstantVariable.create(expert)
            return False
        if not isinstance(container, TensorVariable):
            self._unroll_loop_of(expert)
        return self._replace_subscript(tx, self._select(tx, container, index, 0, keepdim))

    def _subscript_by_tuple(self, tx: Any, container: Any, index: BaseListVariable) -> bool:
        experts = [(dim, item, _expert_of_variable(item.realize())) for dim, item in enumerate(index.items)]
        marked = [(dim, item.realize(), expert) for dim, item, expert in experts if expert is not None]
        if len(marked) != 1 or not isinstance(container, TensorVariable):
            return False
        dim, item, expert = marked[0]
        if isinstance(expert, int) and _rank(item) == 0:
            items = [ConstantVariable.create(expert) if at == dim else other for at, other in enumerate(index.items)]
            tx.stack[-1] = TupleVariable(items)
            return False
        if not isinstance(expert, int) and all(_is_full_slice(other) for at, other in enumerate(index.items) if at != dim):
            return self._replace_subscript(tx, self._select(tx, container, item, dim, _rank(item) == 1))
        if not isinstance(expert, int) and _rank(item) == 0:
            args = (container.as_proxy(), index.as_proxy(), dim)
            proxy = self.output.create_proxy("call_function", index_with_expert, args, {})
            return self._replace_subscript(tx, wrap_fx_proxy(tx, proxy))
        return False

    def _select(self, tx: Any, container: Any, index: TensorVariable, dim: int, keepdim: bool) -> TensorVariable:
        args = (container.as_proxy(), index.as_proxy(), dim, keepdim)
        return wrap_fx_proxy(tx, self.output.create_proxy("call_function", select_expert, args, {}))

    def _replace_subscript(self, tx: Any, result: Any) -> bool:
        tx.popn(2)
        tx.push(result)
        tx.instruction_pointer += 1
        return True

    def _unroll_loop_of(self, expert: fx.Node) -> None:
        scope = next(scope for scope in self._scopes if scope.symbol is expert)
        self.memory.unrolled.add(scope.event.number)
        self._restart("the experts are modules of their own: one iteration per expert")


def _expert_of_variable(variable: Any) -> int | fx.Node | None:
    if not isinstance(variable, TensorVariable) or not isinstance(variable.proxy, fx.Proxy):
        return None
    return expert_of(variable.as_proxy().node)


def _has_open_length(variable: TensorVariable) -> bool:
    value = variable.as_proxy().node.meta["example_value"]
    return value.dim() > 0 and _is_open(value.shape[0])


def _is_open(number: Any) -> bool:
    """Whether a symbolic number depends on data."""
    return isinstance(number, (torch.SymInt, torch.SymBool)) and bool(free_unbacked_symbols(number))


def _rank(variable: TensorVariable) -> int:
    return variable.as_proxy().node.meta["example_value"].dim()


def _constant_slice(start: int) -> SliceVariable:
    return SliceVariable([ConstantVariable.create(value) for value in (start, start + 1, None)])


def _is_full_slice(variable: Any) -> bool:
    variable = variable.realize()
    return isinstance(variable, SliceVariable) and all(item.is_python_constant() and item.as_python_constant() is None for item in variable.items)


def _past_call_without_arguments(tx: Any) -> int | None:
    """Where a method call without arguments that begins at the current instruction has ended."""
    at = tx.instruction_pointer + 1
    while tx.instructions[at].opname in ("PRECALL", "CACHE", "PUSH_NULL"):
        at += 1
    call = tx.instructions[at]
    return at + 1 if call.opname == "CALL" and call.arg == 0 else None
