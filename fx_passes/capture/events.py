"""Events, the stretches of a trace that rest on them, and what restarts of one frame hand on to each other."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._guards import CompileContext

from fx_passes.capture.python_state import Snapshot
from fx_passes.capture.stand_in import StandIn
from fx_passes.facts.statements import Hit
from fx_passes.graph.markers import Expert, expert_parameter
from fx_passes.region import Rejection

_EVENTS = "scatter_moe_events"
_GUARDS = "scatter_moe_guards"
_LOOPS = "scatter_moe_loops"


Place = tuple[CodeType, int]
"""A code object and the number of an instruction in it."""


class Guard(NamedTuple):
    """The assumption that the expert has a token; where `slot` is given, one in that column of ids."""

    ids: fx.Node
    expert: Expert
    slot: int | None = None


class TraceAgain(TensorifyScalarRestartAnalysis):
    """Restarts the analysis of the frame. Dynamo lets only this class of restart pass through a backend."""


@dataclass
class Event:
    """A place where tracing went on under an assumption.

    `routed`: a router came before it in the graph. `root_place`: the instruction of the frame that was being traced.
    `place`: where in its own frame it is. `callees`: the functions that are traced inline there. `can_be_unrolled`: a
    loop that is traced as one iteration and could be traced expert by expert; so it could where it has a `symbol`, the
    expert that stands for those with a token. `helps`: nothing is assumed; Dynamo alone would break the graph there, as
    it may where nothing is rewritten.
    """

    number: int
    kind: str
    location: tuple[str, int]
    routed: bool
    root_place: int
    place: Place
    callees: tuple[CodeType, ...] = ()
    can_be_unrolled: bool = False
    failed: bool = False
    symbol: fx.Node | None = None
    helps: bool = False

    @property
    def is_telling(self) -> bool:
        """Whether it looks like part of a loop over experts."""
        return not self.helps and (self.kind != "dynamic op" or self.routed)


@dataclass
class Scope:
    """A stretch of the trace that rests on one event: up to the next visit of the loop header `header` in `tx`.

    `guard` is what is assumed in it. `loop_over` are the experts of a hit loop, or of one over counts of which the last
    may be missing; then `experts` are those of the iterations to come. `each` is the expert that stands for all in a
    loop over all experts, `stand_ins` the modules that stand for theirs. `before` is Python's state when it began.
    """

    event: Event
    tx: Any
    header: Any
    stack_size: int
    before: Snapshot | None
    guard: Guard | None = None
    loop_over: Hit | None = None
    experts: Iterator[int] | None = None
    each: fx.Node | None = None
    stand_ins: list[StandIn] = field(default_factory=list)

    def begin_iteration(self, expert: Expert) -> None:
        """In a loop over hit experts: this one has a token."""
        assert self.loop_over is not None
        self.guard = Guard(self.loop_over.ids, expert, self.loop_over.slot)

    @property
    def is_loop(self) -> bool:
        return self.loop_over is not None or self.each is not None

    @property
    def symbol(self) -> fx.Node | None:
        """The symbolic expert of a loop that is captured as one iteration."""
        if self.loop_over is None or self.guard is None:
            return self.each
        return self.guard.expert if isinstance(self.guard.expert, fx.Node) else None


@dataclass
class Memory:
    """What is known of a frame from earlier attempts.

    Events that must not be assumed, loops to unroll, what was reported, how often tracing failed, and whether all is
    left to Dynamo alone: after a fault of ours, or for the sake of a caller.
    """

    denied: set[int] = field(default_factory=set)
    unrolled: set[Place] = field(default_factory=set)
    reported: set[Rejection] = field(default_factory=set)
    interrupted: list[int] = field(default_factory=list)
    errors: int = 0
    left_alone: bool = False

    @classmethod
    def of_current_frame(cls) -> "Memory":
        context = CompileContext.get()
        if not hasattr(context, "scatter_moe"):
            context.scatter_moe = cls()
        return context.scatter_moe


def events_of(node: fx.Node) -> tuple[int, ...]:
    """Numbers of the events under which `node` was traced."""
    return node.meta.get(_EVENTS, ())


def without_events(node: fx.Node) -> tuple[int, ...]:
    """Takes the events off `node`, which holds without an assumption, and returns them."""
    return node.meta.pop(_EVENTS, ())


def guards_of(node: fx.Node) -> tuple[Guard, ...]:
    """The assumptions under which `node` was traced."""
    return node.meta.get(_GUARDS, ())


def loops_of(node: fx.Node) -> frozenset[fx.Node]:
    """The experts without a value in whose iteration `node` was traced: those of its loop and of the loops around."""
    if node.target is expert_parameter:
        expert = node.args[1]
        assert isinstance(expert, fx.Node)
        return frozenset((expert,))
    return node.meta.get(_LOOPS, frozenset())


def tag(
    node: fx.Node, numbers: tuple[int, ...], guards: tuple[Guard, ...], loops: frozenset[fx.Node] = frozenset()
) -> None:
    """Marks `node` as traced under these events and assumptions, in the iteration of these loops."""
    node.meta[_EVENTS] = tuple(dict.fromkeys((*events_of(node), *numbers)))
    node.meta[_GUARDS] = guards
    node.meta[_LOOPS] = loops
