"""index_select, gather, index_put and the like, each with one thing that is not what it looks like."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, E
from tests.zoo.masks import MaskLoop


class PickedLoop(MaskLoop):
    """The plain loop; a near miss changes one of its steps."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = self.positions(ids == e)
            self.add(out, tokens, self.experts[e](self.rows(x, tokens)) * weights[tokens, slots, None])
        return out

    def positions(self, mask):
        return torch.where(mask)

    def rows(self, x, tokens):
        return x[tokens]

    def add(self, out, tokens, y):
        out.index_add_(0, tokens, y)


class ColumnsSelected(PickedLoop):
    """The features are put in another order after the rows were taken."""

    def rows(self, x, tokens):
        return x.index_select(0, tokens).index_select(1, torch.arange(D).flip(0))


class GatheredDiagonally(PickedLoop):
    """Each feature is that of another token."""

    def rows(self, x, tokens):
        return x.gather(0, (tokens[:, None] + torch.arange(D)) % x.shape[0])


class GatheredInPart(PickedLoop):
    """Positions of the first rows, each repeated: not those of the expert."""

    def rows(self, x, tokens):
        return x.gather(0, tokens[:, None][torch.zeros_like(tokens)[:, None], 0].expand(-1, D))


class PutWithoutAdding(PickedLoop):
    """`index_put_` keeps the last expert's rows."""

    def add(self, out, tokens, y):
        out.index_put_((tokens,), y)


class PositionsTurned(PickedLoop):
    """Tokens in turned order beside slots in their own: router weights of other tokens."""

    def positions(self, mask):
        tokens, slots = torch.nonzero(mask).T
        return tokens.flip(0), slots


class ComparedWithOthers(PickedLoop):
    """Rows are compared with the mean of all rows of the expert."""

    def add(self, out, tokens, y):
        out.index_add_(0, tokens, y.masked_fill(y < y.mean(0), 0.0))


class BinOfNobody(MaskLoop):
    """With ids up to E the last of E bins from 0 to E counts those of nobody, too."""

    def moe(self, x, ids, weights):
        ids = torch.where(weights < weights.mean(), E, ids)
        counts = torch.histc(ids.view(-1).float(), bins=E, min=0, max=E).int().tolist()
        order = torch.argsort(ids.view(-1), stable=True)
        parts = x[order // self.top_k].split(counts)
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.zeros_like(x).index_add(0, order // self.top_k, torch.cat(outputs))


MISSES = (
    NearMiss("picked_columns", "body_is_row_wise", ColumnsSelected),
    NearMiss("picked_diagonally", "bodies_are_isomorphic", GatheredDiagonally),
    NearMiss("picked_in_part", "bodies_are_isomorphic", GatheredInPart),
    NearMiss("picked_put_without_adding", "assignments_overwrite_nothing", PutWithoutAdding),
    NearMiss("picked_positions_turned", "loop_has_a_known_form", PositionsTurned),
    NearMiss("picked_compared_with_others", "body_is_row_wise", ComparedWithOthers),
    NearMiss("picked_bin_of_nobody", "segments_are_those_of_an_expert", BinOfNobody),
)
