"""Which dims of a tensor count rows, and what one row is.

Dims that count rows are named by labels: T tokens, K experts per token, N = T * K slots, E experts, M = E * T pairs.
Tokens may stand in two dims, a batch of sequences: B and S.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fx_passes.body.values import Value
from fx_passes.facts.statements import TOKENS_BY_BATCH
from fx_passes.graph.views import View

Labels = tuple[str, ...]
SLOTS: tuple[Labels, ...] = (("N",), ("T", "K"))
PAIRS: tuple[Labels, ...] = (("M",), ("E", "T"), ("T", "E"))
PAIRS_BY_BATCH: tuple[Labels, ...] = (*PAIRS, ("E", *TOKENS_BY_BATCH), (*TOKENS_BY_BATCH, "E"))
PARTS: dict[str, Labels] = {"N": ("T", "K"), "M": ("E", "T"), "T": TOKENS_BY_BATCH}
"""The dims of which a dim of slots, pairs or tokens is made."""


def in_parts(labels: Labels) -> Labels:
    """`labels` with each that is made of others in its parts."""
    while any(label in PARTS for label in labels):
        labels = tuple(part for label in labels for part in PARTS.get(label, (label,)))
    return labels


def are_tokens(labels: Labels) -> bool:
    return labels in (("T",), TOKENS_BY_BATCH)


@dataclass(frozen=True, eq=False)
class Rows:
    """The first dims of a node count rows, each of which is a row of `value`.

    `unit` says where a dim of size one stands beside the vector of a row: "before", "after", or "" where none does.
    """

    labels: Labels
    value: Value
    unit: str = ""


@dataclass(frozen=True)
class Input:
    """A tensor from outside, or weights taken by the experts of rows, as each of the views that it is."""

    views: tuple[View, ...]

    def moved(self, move: Callable[[View], View | None]) -> "Input":
        moved = (move(view) for view in self.views)
        return Input(tuple(view for view in moved if view is not None))


@dataclass(frozen=True)
class Total:
    """`rows`, summed over the experts of each token, `onto` what another tensor holds.

    The tokens of the result are counted by `token_dims` dims.
    """

    rows: Value
    onto: fx.Node | None = None
    token_dims: int = 1


Seen = Rows | Input | Total
