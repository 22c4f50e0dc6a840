"""What a recogniser hands to the verifier and the rewriter, and what it says where it can't.

T tokens, K experts per token, E experts, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx

from fx_passes.body.unify import NotIsomorphic, UnknownOperation
from fx_passes.body.values import Body
from fx_passes.facts.statements import Mask
from fx_passes.graph.ops import is_inplace


class Rejected(Exception):
    """Raised by a rule or a form at the first thing that it can't prove; becomes a `Rejection`."""

    def __init__(self, rule: str, node: fx.Node | None, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.node = node
        self.detail = detail


@contextmanager
def mismatches_rejected() -> Iterator[None]:
    """What a walk over the experts' bodies raises, as the rule that it breaks."""
    try:
        yield
    except NotIsomorphic as reason:
        raise Rejected("bodies_are_isomorphic", reason.node, reason.detail) from reason
    except UnknownOperation as reason:
        raise Rejected("operations_are_known", reason.node, str(reason)) from reason


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
    """One `acc.index_add_(0, tokens, value)` or `acc[tokens] += value`; `acc[tokens] = value` where it `assigns`.

    `tokens` in two dims, a batch of sequences, may be a pair. `nodes` are all nodes that belong to it, `result` the
    last. `place` is there where it is `acc[e, tokens]` or `acc[tokens, e]`: the dim that has several outputs, and e.
    """

    accumulator: fx.Node
    tokens: fx.Node | tuple[fx.Node, ...]
    value: fx.Node
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    counts_duplicates: bool
    assigns: bool = False
    place: tuple[int, int] | None = None

    @property
    def token_nodes(self) -> tuple[fx.Node, ...]:
        return self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)


@dataclass(frozen=True, kw_only=True)
class MoERegion:
    """Naive MoE code: `out[t] = sum over k of body_e(x[t]) with e = ids[t, k]`, and the nodes that compute it.

    `ids_TK` and router weights may be flat, [T * K]. `routing` are the nodes between the ids and the positions of rows.
    `inner` are the nodes that depend on an expert's rows and die with the region. `result` is the last node, `output` a
    tensor of the output's shape and dtype. `writes` are the nodes that write, all to tensors which the region itself
    made, and what belongs to these writes. Tokens are counted by the first `token_dims` dims. `addend` is what the sum
    of the experts is added to. `symbol` is there where one iteration over a symbolic expert stands for a loop.
    Where it `counts_from_the_end`, id -1 is expert E - 1. Where it is about one `slot` of the tokens alone, `ids_TK`
    are that slot's, and router weights are still those of all.
    """

    form: str
    ids_TK: fx.Node
    top_k: int
    num_experts: int
    body: Body
    routing: frozenset[fx.Node] = field(repr=False)
    inner: frozenset[fx.Node] = field(repr=False)
    result: fx.Node
    output: torch.Tensor = field(repr=False)
    writes: frozenset[fx.Node] = field(repr=False)
    deviations: tuple[str, ...]
    buffers: tuple[fx.Node, ...] = ()
    token_dims: int = 1
    addend: fx.Node | None = None
    symbol: fx.Node | None = None
    counts_from_the_end: bool = False
    slot: int | None = None

    @property
    def anchor(self) -> fx.Node:
        """The node whose source line stands for the region."""
        return self.result

    @property
    def graph(self) -> fx.Graph:
        return self.anchor.graph

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that hold the output: the result, and the tensor that it was added to in place."""
        return (*self.buffers, self.result)

    @property
    def holders(self) -> tuple[fx.Node, ...]:
        """Those of `outputs` that hold it once the region has run: what is not added to in place stays as it was."""
        return self.outputs

    def places(self) -> dict[fx.Node, int]:
        """Each node's place in the graph as it is now."""
        return {node: place for place, node in enumerate(self.graph.nodes)}


@dataclass(frozen=True, kw_only=True)
class GroupedRegion(MoERegion):
    """Rows that lie expert by expert go in, and rows in the same order come out: `out[i] = body_e(rows[i])`.

    What `body` gathers are these rows, N = T * K of them; e is the expert of row i, of which `ids_TK` has as many as
    there are rows.
    """


@dataclass(frozen=True, kw_only=True)
class LoopRegion(MoERegion):
    """A loop over experts: number i of `accumulations` adds the rows of `masks[i]` to `accumulator`.

    `writes` are the additions. `base` is what tokens without an expert keep, where that isn't zero. The loop runs over
    experts from `first_expert` on; `earlier` are its additions for experts before that, which belong to another region:
    their sum is the `addend`. Where it `is_part`, its output is one of several that are summed.
    """

    accumulator: fx.Node
    accumulations: tuple[Accumulation, ...]
    masks: tuple[Mask, ...]
    base: fx.Node | None
    first_expert: int
    earlier: frozenset[fx.Node] = frozenset()
    is_part: bool = False

    @property
    def anchor(self) -> fx.Node:
        return self.accumulations[0].result

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """Its zeros, then what each addition gives, and the sum of slots where there is one."""
        return (self.accumulator, *(accumulation.result for accumulation in self.accumulations), self.result)

    @property
    def holders(self) -> tuple[fx.Node, ...]:
        return self.outputs if is_inplace(self.anchor) else self.outputs[1:]


@dataclass(frozen=True, kw_only=True)
class SummedRegion(MoERegion):
    """Outputs for some experts or choices each, that are summed: what is said of all is said here, what each is of its
    own in `parts`. All of these have the body, the inner nodes and the writes of the whole.
    """

    parts: tuple[LoopRegion, ...]

    @property
    def anchor(self) -> fx.Node:
        return self.parts[0].anchor
