"""What can be said of a routing tensor; `fx_passes.facts` reads it off the graph.

    OneHot   value[..., t, ..., k, ..., c] == 1 exactly where ids[t, k] == c
    Kept     value[..., c] == 1 where a token has class c and is kept, 0 else
    Mask     value[..., t, ..., k] is true exactly where ids[t, k] == expert; value[t] where ids[t, slot] == expert, or
             where one of the slots of t is the expert's
    Hit      value[c] is true exactly where class c occurs in ids
    Rows     the token or slot positions of the slots of one expert, each once
    Listed   the positions and classes of all slots, in the order of a one-hot tensor's dims
    SlotOf   value[t] is the slot of token t that is the expert's, where there is one
    OwnIds   value[r, k] is ids[t, k] where the r-th token of one expert is t

T tokens, K experts per token. A dim is labelled "T", "K", "N" (slots, n = t * K + k), "E" (classes), "1" (size one) or
"R" where an expert's own tokens alone are left. Tokens that stand in two dims, a batch of sequences, are "B" and "S":
t = b * S + s.
"""

from dataclasses import dataclass

from torch import fx

from fx_passes.graph.markers import Expert

Dims = tuple[str, ...]
TOKENS_BY_BATCH: Dims = ("B", "S")


def with_one_token_dim(dims: Dims) -> Dims:
    """`dims` with the tokens in one, where they stand in two that follow each other."""
    at = next((at for at in range(len(dims)) if dims[at : at + 2] == TOKENS_BY_BATCH), None)
    return dims if at is None else (*dims[:at], "T", *dims[at + 2 :])


@dataclass(frozen=True)
class OneHot:
    """`reduced`: without a dim of slots; one where any slot of the token has the class."""

    ids: fx.Node
    num_classes: int
    dims: Dims
    reduced: bool = False


@dataclass(frozen=True)
class Kept:
    """value[..., c] is 1 where a token has class c and was kept, and else 0: a one-hot tensor times a mask, `node`."""

    num_classes: int
    node: fx.Node


@dataclass(frozen=True)
class Counts:
    """Slots per class, or the `cumulative` sums of that; `positive` once compared with zero (then it is a hit mask).

    `reduced`: tokens per class, whatever the number of their slots with the class. `open_ended`: there are as many
    numbers as the largest class that occurs asks for; `num_classes` at most, where all ids are known to be below that.
    """

    ids: fx.Node
    num_classes: int
    positive: bool = False
    cumulative: bool = False
    reduced: bool = False
    open_ended: bool = False

    @property
    def may_be_hits(self) -> bool:
        """Whether a number is positive exactly where its class occurs."""
        return not (self.positive or self.cumulative or self.open_ended)


@dataclass(frozen=True)
class Hit:
    """The classes that occur in ids, ascending, each once: `nonzero()` of a hit mask, or a tuple of that alone.

    `slot`: in that column of ids.
    """

    ids: fx.Node
    num_classes: int
    as_tuple: bool = False
    slot: int | None = None


@dataclass(frozen=True)
class Mask:
    """`slot`: in that column of ids alone. `reduced`: in any slot of the token, so there is no dim of slots.

    `sort`: what sorted the slots, where those that are chosen come in that order and not in their own.
    """

    ids: fx.Node
    expert: Expert
    dims: Dims
    slot: int | None = None
    reduced: bool = False
    sort: fx.Node | None = None

    @property
    def key(self) -> tuple[fx.Node, Expert, int | None]:
        """The slots that are chosen, in whatever order."""
        return self.ids, self.expert, self.slot

    def picks_as(self, other: "Mask") -> bool:
        """Whether the slots of `other` come in the same order here.

        A reduced mask names each token once: that is the order by token where a token's ids are distinct, which then
        must hold of `other`.
        """
        same_order = self._order() == other._order() and self.sort is other.sort
        once_a_token = self.reduced or "R" in self.dims
        return self.key == other.key and same_order and once_a_token <= other.reduced

    def _order(self) -> Dims:
        dims = with_one_token_dim(tuple(label for label in self.dims if label != "1"))
        return ("T", "K") if "N" in dims or (self.reduced and dims == ("T",)) or dims == ("R", "K") else dims


@dataclass(frozen=True)
class Selection:
    """The tuple of index tensors that `torch.where(mask)` gives, or its columns as one tensor (`as_tuple=False`)."""

    mask: Mask
    as_tuple: bool


@dataclass(frozen=True)
class Rows:
    """For each slot of one expert, in the order of `mask`'s dims, its position along `axis`: T, K, N, B or S."""

    mask: Mask
    axis: str


@dataclass(frozen=True)
class Occupied:
    """A scalar: how many slots one expert has, or whether it has any."""

    mask: Mask


@dataclass(frozen=True)
class SlotOf:
    mask: Mask


@dataclass(frozen=True)
class OwnIds:
    mask: Mask


@dataclass(frozen=True)
class Listed:
    """What `torch.where(one_hot)` gives: each slot and its class; `axis` where it is the positions along one dim."""

    one_hot: OneHot
    axis: str = ""


@dataclass(frozen=True)
class ListedMask:
    """True at the slots of one class, among all that are listed."""

    one_hot: OneHot
    expert: Expert


Fact = OneHot | Kept | Counts | Hit | Mask | Selection | Rows | Occupied | SlotOf | OwnIds | Listed | ListedMask
