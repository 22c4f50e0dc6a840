"""The expert body of code in which each expert reads segments of rows that lie expert by expert.

expert_segment(rows, counts, e)     Gathered: all of `rows`
"""

from torch import fx

from fx_passes.body.unify import NotIsomorphic, Unifier
from fx_passes.body.values import Body, Gathered, SlotGathered
from fx_passes.capture import events_of
from fx_passes.facts import counts_behind, fact
from fx_passes.facts.statements import Counts
from fx_passes.facts.totals import total_of
from fx_passes.graph.markers import expert_cat, expert_segment
from fx_passes.graph.ops import known_tensor
from fx_passes.region import mismatches_rejected


def segment_body(parts: tuple[fx.Node, ...], counts: Counts) -> Body:
    """The body that computes `parts[e]` from the segments of expert e.

    Raises:
        Rejected: where the experts compute different things, or something that no rule speaks of.
    """
    walk = _SegmentUnifier(counts)
    with mismatches_rejected():
        root = walk.value(parts)
    return Body(root, tuple(walk.values), walk.nodes(), frozenset(walk.writes))


def numbers_of_slots(graph: fx.Graph, ids: fx.Node) -> list[fx.Node]:
    """Numbers of slots of experts that Python had, and what was made of such numbers under an assumption."""
    return [node for node in graph.nodes if _is_number_of_slots(node, ids)]


def _is_number_of_slots(node: fx.Node, ids: fx.Node) -> bool:
    counts = counts_behind(node)
    if counts is not None:
        return counts.ids is ids
    total = total_of(node) if events_of(node) else None
    return total is not None and total.ids is ids


class _SegmentUnifier(Unifier):
    """What depends on an expert is its parameters and its segments; what all segments were put together to is not."""

    def __init__(self, counts: Counts) -> None:
        super().__init__((), tuple(range(counts.num_classes)))
        self.counts = counts

    def _gathered(self, nodes: tuple[fx.Node, ...]) -> Gathered | SlotGathered | None:
        first = nodes[0]
        if first.target is not expert_segment:
            return None
        rows = first.args[0]
        for node, expert in zip(nodes, self.experts, strict=True):
            own = node.target is expert_segment and node.args[0] is rows and node.args[2] == expert
            if not own or fact(node.args[1]) != self.counts:
                raise NotIsomorphic(node, "an expert reads the segment of another one")
        return Gathered(rows, first) if known_tensor(rows).dim() > 1 else SlotGathered(rows, first, trailing=0)

    def _is_inner(self, node: fx.Node) -> bool:
        if node not in self._inner:
            self._inner[node] = False
            reads = any(map(self._is_inner, node.all_input_nodes)) if node.target is not expert_cat else False
            self._inner[node] = node.target is expert_segment or reads
        return self._inner[node]
