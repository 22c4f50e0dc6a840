"""The Dynamo backend `"scatter_moe"`: rewrite what is proven, then hand the graph to an inner compiler.

torch.compile(model, backend="scatter_moe")                                            Inductor
torch.compile(model, backend="scatter_moe", mode="max-autotune")                       Inductor in that mode
torch.compile(model, backend="scatter_moe", options={"inner_backend": "aot_eager"})    another compiler
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters

import registrations  # noqa: F401  (the ops must exist before a graph names them)
from fx_passes import pipeline
from fx_passes.cache_key import caches_keyed_by_sources
from fx_passes.capture import Capture, Event, callers, guards_of
from fx_passes.entry import hook
from fx_passes.entry.forward_mode import guard_forward_mode
from fx_passes.entry.hook_guards import guard_hooks_of
from fx_passes.faults import own_code
from fx_passes.graph.ops import op_name
from fx_passes.region import Rejected, Rejection
from fx_passes.report import current_report, record_rejections, source_line

log = logging.getLogger("scatter_moe")

INNER_BACKEND = "inner_backend"

_OURS = "is_scatter_moe"
"""Attribute of a backend that rewrites as this one does."""


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compiles `gm` as Dynamo asks a backend to.

    Args:
        mode: one of `torch.compile`'s modes; as with the inner backend Inductor alone.
        options: Inductor's options, and `inner_backend`, the name of another registered backend (which takes no mode
            and no options here).

    Raises:
        RuntimeError: for an option that Inductor doesn't know.
        ValueError: for `mode` or options together with an inner backend other than Inductor, and for an inner backend
            that is this one or none at all.
    """
    inner = _inner_compiler(mode, dict(options or {}), _is_dynamic(hook.current_capture()))
    if not hook.is_rewritten():
        rewrite_graph(gm)
    with caches_keyed_by_sources(gm):
        return inner(gm, example_inputs)


def rewrite_graph(gm: fx.GraphModule) -> bool:
    """Rewrites `gm` in place and counts what was done.

    Asks Dynamo to trace the frame again where an assumption did not hold, and without us after a fault of ours.
    """
    capture = hook.current_capture()
    return (capture is None or not capture.memory.left_alone) and _rewrite_captured(capture, gm)


@own_code
def _rewrite_captured(capture: Capture | None, gm: fx.GraphModule) -> bool:
    before = gm.print_readable(print_output=False) if log.isEnabledFor(logging.DEBUG) else ""
    outcome = pipeline.run(gm)
    if capture is not None:
        _trace_again_if_not_one(capture, outcome)
    record_rejections(outcome.rejections, capture.memory.reported if capture is not None else set())
    if capture is not None:
        _trace_again_if_assumed(capture, outcome)
    guard_hooks_of(outcome.replaced)
    if outcome.regions:
        guard_forward_mode()
    if capture is not None:
        capture.guard_every_expert()
    counters["scatter_moe"]["rewritten"] += len(outcome.regions)
    report = current_report()
    report.regions.extend(outcome.regions)
    report.graphs += 1
    if outcome.regions and before:
        log.debug("graph before the rewrite:\n%s\ngraph after it:\n%s", before, gm.print_readable(print_output=False))
    return bool(outcome.regions)


def _trace_again_if_not_one(capture: Capture, outcome: pipeline.Outcome) -> None:
    """What speaks against a loop is said of its experts one by one."""
    loops = capture.not_to_be_taken_as_one(outcome.erased_events, outcome.remaining_events)
    if loops:
        capture.trace_again_unrolled(loops)


def _trace_again_if_assumed(capture: Capture, outcome: pipeline.Outcome) -> None:
    leftover = capture.leftover(outcome.erased_events, outcome.remaining_events, bool(outcome.regions))
    if not leftover:
        capture.break_where_dynamo_would()
        return
    if any(rejection.rule == callers.RULE for rejection in outcome.rejections):
        capture.leave_callees_alone(leftover)
    explained = outcome.rejections or capture.memory.reported
    telling = [event for event in leftover if event.is_telling]
    if telling and not explained:
        record_rejections([_unrecognised(telling[-1], outcome)], capture.memory.reported)
    capture.trace_again_without(leftover[:1] if outcome.regions else leftover)


def _unrecognised(event: Event, outcome: pipeline.Outcome) -> Rejection:
    effect = outcome.effects.get(event.number) if outcome.regions else None
    if effect is not None and guards_of(effect):
        detail = f"`{op_name(effect)}` runs only where an expert has tokens, and is no part of what it does with them"
        return pipeline.rejection(Rejected("guards_only_skip_empty_experts", effect, detail))
    detail = f"{event.kind} that belongs to no form of a loop over experts"
    return Rejection("loop_has_a_known_form", detail, *source_line(*event.location))


def _inner_compiler(mode: str | None, options: dict[str, Any], dynamic: bool | None) -> Callable[..., Any]:
    name = options.pop(INNER_BACKEND, "inductor")
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, dynamic)
    if mode not in (None, "default") or options:
        raise ValueError(
            f"inner_backend={name!r} takes no mode and no options, got mode={mode!r} and options {sorted(options)}"
        )
    compiler = lookup_backend(name)
    if not callable(compiler) or is_ours(compiler):
        raise ValueError(f"inner_backend: got {name!r}, accepted is another backend or its name")
    return compiler


def _is_dynamic(capture: Capture | None) -> bool | None:
    """The `dynamic` that was given to torch.compile: modes of Inductor depend on it."""
    wrapper = _find(capture.output.compiler_fn, lambda fn: hasattr(fn, "dynamic")) if capture is not None else None
    return wrapper.dynamic if wrapper is not None else None


def backend_for_report() -> Callable[..., Any]:
    """A backend of its own identity, so that nothing compiled before is reused, which only rewrites."""

    def rewrite_only(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return backend(gm, example_inputs, options={INNER_BACKEND: "eager"})

    setattr(rewrite_only, _OURS, True)
    return rewrite_only


def is_ours(compiler_fn: Any) -> bool:
    """Whether a frame with this compiler function is compiled by this backend, through whatever wrappers."""
    return _find(compiler_fn, lambda fn: fn is backend or hasattr(fn, _OURS)) is not None


def gets_whole_graphs(compiler_fn: Any) -> bool:
    """Whether this backend gets the graphs as they were traced: DDP's optimizer cuts them where its buckets end."""
    return is_ours(compiler_fn) and _find(compiler_fn, _cuts_graphs) is None


def _cuts_graphs(compiler_fn: Any) -> bool:
    return isinstance(getattr(compiler_fn, "__self__", None), DDPOptimizer)


def _find(compiler_fn: Any, test: Callable[[Any], bool]) -> Any:
    seen = 0
    while compiler_fn is not None and seen < 16:
        if test(compiler_fn):
            return compiler_fn
        if _cuts_graphs(compiler_fn):
            compiler_fn = compiler_fn.__self__
        names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn", "backend_compile_fn")
        compiler_fn = next(
            (getattr(compiler_fn, name) for name in names if getattr(compiler_fn, name, None) is not None), None
        )
        seen += 1
    return None


def install() -> None:
    """Extends Dynamo for frames of this backend. Safe to call again."""
    hook.install(is_ours, gets_whole_graphs, rewrite_graph)
