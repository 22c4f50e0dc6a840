"""One attempt to trace one frame: numbers its events, marks their nodes, restarts where an assumption did not hold."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SpeculationRestartAnalysis

from fx_passes import faults
from fx_passes.capture import calls, counts
from fx_passes.capture.callers import callees_at, is_left_alone, leave_alone
from fx_passes.capture.events import Event, Memory, Place, Scope, TraceAgain, tag
from fx_passes.capture.handlers import handler_of
from fx_passes.capture.opaque import tells_apart
from fx_passes.capture.python_state import shows_all
from fx_passes.capture.routers import Routers
from fx_passes.capture.stand_in import StandIn, guard_every_expert, is_left_in
from fx_passes.facts import selected
from fx_passes.facts.statements import Mask
from fx_passes.faults import own_code
from fx_passes.graph.markers import is_asked_for_number
from fx_passes.region import Rejection
from fx_passes.report import innermost_source, record_rejections, source_line


class Capture:
    """The events of one attempt at tracing one frame.

    `routers`: those seen so far. Without any, a place that is left to Dynamo is not worth a word.
    `stand_ins`: those of loops that have ended. `uncounted`: ids whose counts are left to Dynamo.
    """

    def __init__(self, output: Any) -> None:
        self.output = output
        self.memory = Memory.of_current_frame()
        self.events: list[Event] = []
        self.scopes: list[Scope] = []
        self.masks_of_symbol: dict[Any, Mask] = {}
        self.counted: list[counts.Counted] = []
        self.uncounted: set[fx.Node] = set()
        self.numbers: dict[fx.Node, list[Any]] = {}
        self.routers = Routers()
        self._last_node: dict[fx.Graph, fx.Node | None] = {}
        self.stand_ins: list[tuple[StandIn, Event]] = []
        self._stock_allows_dynamic = output.shape_env.allow_dynamic_output_shape_ops
        self._stock_caches = output.fake_mode.cache_enabled
        self._unbacked_seen = output.shape_env.unbacked_symint_counter
        if is_left_alone(output):
            self.memory.left_alone = True

    def step(self, tx: Any, original: Callable[[Any], bool]) -> bool:
        """One instruction of `tx`, with what Dynamo cannot do replaced by an assumption."""
        if self.memory.left_alone or tx.instruction_pointer is None:
            return original(tx)
        if self._handle(tx):
            return True
        try:
            return original(tx)
        except TraceAgain:
            raise
        except RestartAnalysis as restart:
            self._unroll_where_left(tx)
            if tx.parent is None and isinstance(restart, SpeculationRestartAnalysis):
                self.memory.interrupted = [event.root_place for event in self.events]
            raise
        except Exception as error:
            if not self.memory.left_alone:
                self._unroll_where_left(tx)
                self._trace_again_without_assumptions(tx, error)
            raise
        finally:
            self._tag_new_nodes(tx)

    @own_code
    def _handle(self, tx: Any) -> bool:
        """Whether the instruction's work was done here."""
        instruction = tx.instructions[tx.instruction_pointer]
        self._unroll_where_told_apart(tx, instruction)
        handler = handler_of(instruction.opname)
        if handler is not None and handler(self, tx, instruction):
            self._tag_new_nodes(tx)
            return True
        self._allow_dynamic_op()
        self._cache_fake_results()
        return False

    @own_code
    def call(self, tx: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call in `tx`, or None where it is Dynamo's to find."""
        return calls.call(self, tx, fn, args, kwargs) if not self.memory.left_alone else None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """`node` as Dynamo's variables hold it."""
        return fx.Proxy(node, self.output.current_tracer)

    def give_up(self, error: Exception) -> None:
        """After a fault of ours the frame is left to Dynamo alone, unless faults are raised."""
        self.memory.left_alone = True
        if faults.are_raised():
            return
        faults.warn_of(error)
        frame = self.output.root_tx.frame_summary()
        place = source_line(frame.filename, frame.lineno or 0)
        rejection = Rejection("scatter_moe_has_no_fault", f"{type(error).__name__}: {error}", *place)
        record_rejections([rejection], self.memory.reported)
        self._restart("a fault of its own")

    def event(self, tx: Any, kind: str) -> Event:
        """The next event, at the current line of `tx`."""
        frame = tx.frame_summary()
        location = (frame.filename, frame.lineno or 0)
        event = Event(
            len(self.events), kind, location, self.routers.seen, self._root_place(), self.place_of(tx), callees_at(tx)
        )
        self.events.append(event)
        return event

    def place_of(self, tx: Any) -> Place:
        """The instruction that `tx` is about to run."""
        return tx.f_code, tx.instruction_pointer

    def forget_new_symbols(self) -> None:
        """Symbols that were made just now belong to an event already."""
        self._unbacked_seen = self.output.shape_env.unbacked_symint_counter

    def is_denied(self, event: Event) -> bool:
        return event.number in self.memory.denied

    def is_in_iteration_of(self, expert: Any) -> bool:
        """Whether the trace is inside the iteration of a loop that `expert` stands for."""
        if any(scope.each is not None and scope.each is expert for scope in self.scopes):
            return True
        guards = [scope.guard for scope in self.scopes if scope.loop_over is not None and scope.guard is not None]
        return any(guard.expert is expert or (type(expert) is int and guard.expert == expert) for guard in guards)

    def reject(self, tx: Any, rule: str, detail: str) -> None:
        """Says why a place that looks like part of an expert loop is left to Dynamo.

        Within a loop that will be traced expert by expert then, it is too early for that.
        """
        if self.routers.seen and not any(scope.event.can_be_unrolled for scope in self.scopes):
            frame = tx.frame_summary()
            rejection = Rejection(rule, detail, *source_line(frame.filename, frame.lineno or 0))
            record_rejections([rejection], self.memory.reported)

    def shows_all(self, tx: Any) -> bool:
        """Whether it would show if a stretch of `tx` changed something in Python."""
        seen = shows_all(tx)
        if not seen:
            self.reject(tx, "loop_changes_no_python_state", "the loop is in a generator, which works for anyone")
        return seen

    def not_to_be_taken_as_one(self, erased: set[int], remaining: set[int]) -> list[Event]:
        """Loops traced as one iteration that the rewrite did not dissolve, or whose stand-in is still read.

        A loop over hit experts only where it is known that their numbers would help.
        """
        kept = [event for stand_in, event in self.stand_ins if is_left_in(self.output.root_tracer.graph, stand_in)]
        open_loops = [scope.event for scope in self.scopes]
        left = [event for event in self.events if not self._is_dissolved(event, erased, remaining)]
        return [
            event for event in (*left, *kept, *open_loops) if _is_unrolled_next(event) and not self.is_denied(event)
        ]

    def leftover(self, erased: set[int], remaining: set[int], rewritten: bool) -> list[Event]:
        """Events that the rewrite did not dissolve, and those of loops that were left before their end.

        Help that rests on nothing is left where nothing was `rewritten`.
        """
        for scope in self.scopes:
            scope.event.failed = True
            self.reject(scope.tx, "loop_runs_to_its_end", "the loop is left by break, return or an error")
        live = [event for event in self.events if not self.is_denied(event)]
        return [e for e in live if not (rewritten if e.helps else self._is_dissolved(e, erased, remaining))]

    def _is_dissolved(self, event: Event, erased: set[int], remaining: set[int]) -> bool:
        return not event.failed and event.number in erased and event.number not in remaining

    def guard_every_expert(self) -> None:
        """At the end of the trace: what was read from a stand-in is guarded in all experts."""
        guard_every_expert(self.output, [stand_in for stand_in, _ in self.stand_ins])

    def trace_again_without(self, events: list[Event]) -> None:
        """Restarts the frame; what stood at `events` is then left to Dynamo."""
        self.memory.denied.update(event.number for event in events)
        places = ", ".join(f"{event.kind} at {event.location[0]}:{event.location[1]}" for event in events)
        self._restart(f"not part of a rewritten region: {places}")

    def leave_callees_alone(self, events: list[Event]) -> None:
        """What is traced inline at `events` is left alone where it becomes frames of its own for this one."""
        for event in events:
            leave_alone(event.callees, self.output.root_tx.f_code)

    def break_where_dynamo_would(self) -> None:
        """Denies an assumption that moved a graph break.

        Dynamo takes a graph break back to the begin of a statement. Where an assumption was made in that statement,
        Dynamo alone would have broken there and not here: the frame is then traced again with that assumption denied.
        """
        interrupted, self.memory.interrupted = self.memory.interrupted, []
        first_lost = len(self.events)
        if first_lost < len(interrupted) and interrupted[first_lost] != self._root_place():
            self.memory.denied.add(first_lost)
            self._restart("a graph break came after an assumption in the same statement")

    def _root_place(self) -> int:
        tx = self.output.root_tx
        return tx.indexof[tx.current_instruction]

    def trace_again_unrolled(self, loops: list[Event]) -> NoReturn:
        """Restarts the frame; `loops` then have one iteration an expert, and events other numbers."""
        self.memory.unrolled.update(loop.place for loop in loops)
        self.memory.denied.clear()
        self.memory.interrupted, self.memory.errors = [], 0
        self._restart("one iteration per expert, since one does not stand for all")

    def _unroll_where_left(self, tx: Any) -> None:
        """An error leaves a loop that is traced as one iteration: Dynamo may be able to trace each iteration."""
        left = [scope.event for scope in self.scopes if scope.tx is tx and scope.event.can_be_unrolled]
        if left:
            self.trace_again_unrolled(left)

    def _unroll_where_told_apart(self, tx: Any, instruction: Any) -> None:
        """Something may ask which expert it is that stands for all."""
        loops = [scope for scope in self.scopes if scope.event.can_be_unrolled]
        if not loops:
            return
        symbols = [scope.each.meta["example_value"].node.expr for scope in loops if scope.each is not None]
        if tells_apart(tx, instruction, frozenset(symbols)):
            self.trace_again_unrolled([scope.event for scope in loops])

    def _restart(self, reason: str) -> NoReturn:
        self.output.root_tx.speculation_log.clear()
        raise TraceAgain(restart_reason=f"scatter_moe: {reason}")

    def _trace_again_without_assumptions(self, tx: Any, error: Exception) -> None:
        """Tracing failed under an assumption where Dynamo alone may not: first the last one is dropped, then all."""
        live = [event for event in self.events if not self.is_denied(event)]
        if tx.parent is not None or not live:
            return
        if self.masks_of_symbol or any(event.kind == "hit loop" for event in live):
            self._reject_untraceable(error)
        self.memory.errors += 1
        dropped = live[-1:] if self.memory.errors == 1 else live
        self.memory.denied.update(event.number for event in dropped)
        self._restart(f"{type(error).__name__} while tracing: {error}")

    def _reject_untraceable(self, error: Exception) -> None:
        """Dynamo gave up on a frame in which the rows of an expert are selected: says where and why."""
        frames = getattr(error, "real_stack", None)
        place = innermost_source((frame.filename, frame.lineno or 0) for frame in frames or ())
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        record_rejections([Rejection("loop_can_be_traced", reason, *place)], self.memory.reported)

    def _allow_dynamic_op(self) -> None:
        allowed = self._stock_allows_dynamic or len(self.events) not in self.memory.denied
        shape_env = self.output.shape_env
        if shape_env.allow_dynamic_output_shape_ops != allowed:
            shape_env.settings = dataclasses.replace(shape_env.settings, allow_dynamic_output_shape_ops=allowed)

    def _cache_fake_results(self) -> None:
        """Not within a loop: an expert has rows without a number, so sizes that never come again."""
        self.output.fake_mode.cache_enabled = self._stock_caches and not self.scopes

    @own_code
    def _tag_new_nodes(self, tx: Any) -> None:
        nodes = self._new_nodes(self.output.current_tracer.graph)
        self.routers.note(nodes)
        counter = self.output.shape_env.unbacked_symint_counter
        numbers = tuple(scope.event.number for scope in self.scopes)
        if counter != self._unbacked_seen:
            self._unbacked_seen = counter
            if not self._stock_allows_dynamic:
                numbers = (*numbers, self.event(tx, "dynamic op").number)
            for node in nodes:
                self._note_selection(node)
        if numbers:
            guards = tuple(scope.guard for scope in self.scopes if scope.guard is not None)
            loops = frozenset(scope.symbol for scope in self.scopes if scope.symbol is not None)
            for node in nodes:
                if node.op not in ("placeholder", "get_attr"):
                    tag(node, numbers, guards, loops)

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
        mask = selected(node)
        if mask is None:
            return
        value = node.meta["example_value"]
        length = (value[0] if isinstance(value, (tuple, list)) else value).shape[0]
        if isinstance(length, torch.SymInt):
            self.masks_of_symbol[length.node.expr] = mask


def _is_unrolled_next(event: Event) -> bool:
    return event.can_be_unrolled or is_asked_for_number(event.symbol)
