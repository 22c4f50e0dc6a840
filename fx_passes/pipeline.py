"""The pass: each form finds its candidates; one that is recognised is verified and rewritten.

Plan, then commit: a region is rewritten whole or not at all. Graphs of higher-order ops (checkpointing) are visited
like the main one.
"""

import logging
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import fx

from fx_passes.capture import events_of, without_events
from fx_passes.facts import forget_erased
from fx_passes.forms import FORMS
from fx_passes.graph.aliasing import note_inputs_in_one_memory
from fx_passes.graph.ops import is_inplace
from fx_passes.region import MoERegion, Rejected, Rejection
from fx_passes.report import RegionReport, module_path_of, source_of
from fx_passes.rewriting.leaves import changes_nothing, is_leaf
from fx_passes.rewriting.lengths import sum_masks
from fx_passes.rewriting.loop_invariant import is_left_for_ours
from fx_passes.rewriting.products_in_place import put_products_in_place
from fx_passes.rewriting.rewrite import rewrite
from fx_passes.rewriting.segment_writes import put_together, written_by_segment
from fx_passes.rewriting.static_counts import fix_lengths
from fx_passes.rules.modes import switches_grad_mode
from fx_passes.rules.verify import verify

log = logging.getLogger("scatter_moe")


@dataclass
class Outcome:
    """What one run of the pass did to a graph, and which events its nodes still rest on.

    `effects`: of these events, the first node in place that rests on each. `replaced`: of each region the anchor and
    the nodes.
    """

    regions: list[RegionReport] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    erased_events: set[int] = field(default_factory=set)
    remaining_events: set[int] = field(default_factory=set)
    effects: dict[int, fx.Node] = field(default_factory=dict)
    replaced: list[tuple[fx.Node, frozenset[fx.Node]]] = field(default_factory=list)


def run(gm: fx.GraphModule) -> Outcome:
    """Rewrites every provable region of `gm` and of the graphs nested in it, in place."""
    outcome = Outcome()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            _run_on_graph(module, outcome)
    return outcome


def _run_on_graph(gm: fx.GraphModule, outcome: Outcome) -> None:
    found_before = len(outcome.regions)
    forget_erased(gm.graph)
    note_inputs_in_one_memory(gm.graph)
    counted = fix_lengths(gm.graph)
    changed = sum_masks(gm.graph) or bool(counted)
    for rows in written_by_segment(gm.graph):
        changed |= _put_together(rows, outcome)
    for form in FORMS:
        changed |= _rewrite_all(form, gm.graph, outcome)
    changed |= put_products_in_place(gm.graph)
    outcome.erased_events |= counted if outcome.regions else set()
    for node in gm.graph.nodes if len(outcome.regions) > found_before else ():
        if is_leaf(node) and changes_nothing(node):
            outcome.erased_events.update(without_events(node))
    for node in gm.graph.nodes:
        if not switches_grad_mode(node) and not is_left_for_ours(node):
            outcome.remaining_events.update(events_of(node))
            outcome.effects |= {event: node for event in events_of(node) if is_inplace(node)} | outcome.effects
    if changed:
        gm.graph.lint()
        gm.recompile()


def _put_together(rows: fx.Node, outcome: Outcome) -> bool:
    try:
        put_together(rows)
    except Rejected as reason:
        outcome.rejections.append(rejection(reason))
        return False
    return True


def _candidates(form: ModuleType, graph: fx.Graph, outcome: Outcome) -> list[Any]:
    try:
        return list(form.candidates(graph))
    except Rejected as reason:
        outcome.rejections.append(rejection(reason))
        return []


def _rewrite_all(form: ModuleType, graph: fx.Graph, outcome: Outcome) -> bool:
    """The last candidate first: what one reads, perhaps the result of an earlier one, is then what was found."""
    changed, regions, rejections = False, len(outcome.regions), len(outcome.rejections)
    for candidate in reversed(_candidates(form, graph, outcome)):
        changed |= _rewrite_candidate(form, candidate, outcome)
    outcome.regions[regions:] = reversed(outcome.regions[regions:])
    outcome.rejections[rejections:] = reversed(outcome.rejections[rejections:])
    return changed


def _rewrite_candidate(form: ModuleType, candidate: Any, outcome: Outcome) -> bool:
    try:
        region = form.match(candidate)
        verify(region)
    except Rejected as reason:
        outcome.rejections.append(rejection(reason))
        return False
    described = _describe(region)
    outcome.replaced.append((region.anchor, region.inner | region.body.nodes))
    rewritten = rewrite(region)
    outcome.erased_events |= rewritten.erased_events
    outcome.regions.append(RegionReport(**described, activation=rewritten.activation, op=rewritten.op))
    return True


def _describe(region: MoERegion) -> dict[str, object]:
    source, code = source_of(region.anchor)
    return {
        "form": region.form,
        "module_path": module_path_of(region.anchor),
        "source": source,
        "code": code,
        "num_experts": region.num_experts,
        "top_k": region.top_k,
        "deviations": region.deviations,
    }


def rejection(reason: Rejected) -> Rejection:
    """The user's view of `reason`."""
    return Rejection(reason.rule, reason.detail, *source_of(reason.node), module_path_of(reason.node))
