"""What a recogniser hands to the verifier and the rewriter, and what it says where it can't.

T tokens, K experts per token, E experts, D model width.
"""

from dataclasses import dataclass, field

from torch import fx

from fx_passes.body import Body
from fx_passes.facts import Mask, fact
from fx_passes.ops import known_tensor


class Rejected(Exception):
    """Raised by a rule or a form at the first thing that it can't prove; becomes a `Rejection`."""

    def __init__(self, rule: str, node: fx.Node | None, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.node = node
        self.detail = detail


@dataclass(frozen=True)
class Rejection:
    """A candidate that stays as it was: the rule that failed and what was seen there.

    `source` is the place in the user's code, as `path/file.py:12`, and `code` that line.
    """

    rule: str
    detail: str
    source: str
    code: str = ""
    module_path: str = ""

    def __str__(self) -> str:
        place = f"{self.source}: {self.code}" if self.code else self.source
        return f"{self.rule}: {self.detail} ({place})"


@dataclass(frozen=True)
class Accumulation:
    """One `acc.index_add_(0, tokens, value)` or `acc[tokens] += value`.

    `nodes` are all nodes that belong to it, `result` the last.
    """

    accumulator: fx.Node
    tokens: fx.Node
    value: fx.Node
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    counts_duplicates: bool


@dataclass(frozen=True)
class MoERegion:
    """A naive MoE loop: `out[t] = sum over k of body_e(x[t]) with e = ids[t, k]`, and the nodes that compute it.

    `inner` are the nodes that depend on an expert's rows (or on the list of hit experts) and die with the loop. `hit`
    and `symbol` are there where one iteration over a symbolic expert stands for the loop.
    """

    form: str
    ids_TK: fx.Node
    num_experts: int
    body: Body
    accumulator: fx.Node
    accumulations: tuple[Accumulation, ...]
    masks: tuple[Mask, ...]
    inner: frozenset[fx.Node] = field(repr=False)
    symbol: fx.Node | None = None

    @property
    def result(self) -> fx.Node:
        return self.accumulations[-1].result

    @property
    def anchor(self) -> fx.Node:
        """The node whose source line stands for the region."""
        return self.accumulations[0].result

    @property
    def graph(self) -> fx.Graph:
        return self.anchor.graph

    @property
    def top_k(self) -> int:
        ids = known_tensor(self.ids_TK)
        return int(ids.shape[1]) if ids.dim() == 2 else 1

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that hold the output: its zeros, then what each addition gives."""
        return (self.accumulator, *(accumulation.result for accumulation in self.accumulations))

    @property
    def additions(self) -> frozenset[fx.Node]:
        """All nodes of the additions to the output."""
        return frozenset(node for accumulation in self.accumulations for node in accumulation.nodes)

    def places(self) -> dict[fx.Node, int]:
        """Each node's place in the graph as it is now."""
        return {node: place for place, node in enumerate(self.graph.nodes)}

    def routing(self) -> frozenset[fx.Node]:
        """Nodes between the ids and the row positions: one_hot, permute, comparison, where."""
        nodes: set[fx.Node] = set()
        stack = [accumulation.tokens for accumulation in self.accumulations]
        stack += [self.symbol] if self.symbol is not None else []
        while stack:
            node = stack.pop()
            if node not in nodes and node is not self.ids_TK and (fact(node) is not None or node is self.symbol):
                nodes.add(node)
                stack.extend(node.all_input_nodes)
        return frozenset(nodes)
