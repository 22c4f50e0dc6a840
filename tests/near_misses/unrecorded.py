"""The router's weights are brought to where they stand without a record for backward: they get no gradient."""

import torch

from tests.near_misses.common import NearMiss
from tests.near_misses.flat import FlatLoop, PairedLoop
from tests.zoo.common import D, E
from tests.zoo.dense_modules import SumOfProducts
from tests.zoo.masks import MaskLoop
from tests.zoo.segments import ArrayBlock


class DenseColumns(SumOfProducts):
    """The columns of a table."""

    def add_up(self, x, table):
        with torch.no_grad():
            columns = [table[..., e, None] for e in range(E)]
        return sum(column * expert(x) for column, expert in zip(columns, self.experts, strict=True))


class DenseMasked(MaskLoop):
    """The sum of a token's weights for an expert."""

    def moe(self, x, ids, weights):
        with torch.no_grad():
            columns = [(weights * (ids == e)).sum(-1, keepdim=True) for e in range(E)]
        return sum(column * expert(x) for column, expert in zip(columns, self.experts, strict=True))


class DenseStacked(MaskLoop):
    """Weights of the chosen outputs, with a dim more."""

    def moe(self, x, ids, weights):
        with torch.no_grad():
            weights = weights.unsqueeze(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (outputs.gather(1, ids.unsqueeze(-1).expand(-1, -1, D)) * weights).sum(dim=1)


class FlatWeights(FlatLoop):
    """Weights of slots that are summed."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids)
        with torch.no_grad():
            weights = weights.unsqueeze(-1)
        return (y.view(*ids.shape, D) * weights).sum(dim=1)


class PairedWeights(PairedLoop):
    """So where slots have two dims."""

    def combine(self, y, weights):
        with torch.no_grad():
            weights = weights.unsqueeze(-1)
        return (y * weights).sum(dim=1)


class InferredWeights(MaskLoop):
    """Flat weights, made in inference mode."""

    def moe(self, x, ids, weights):
        flat, out = ids.view(-1), torch.zeros_like(x)
        with torch.inference_mode():
            weights = weights.view(-1)
        for e in range(self.num_experts):
            slots = torch.where(flat == e)[0]
            tokens = slots // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[slots].unsqueeze(1))
        return out


class RowsOfSlots(ArrayBlock):
    """Sorted rows are put back into the places of their slots: experts get no gradient."""

    def combine(self, grouped, x, order, weights):
        slots = torch.empty_like(grouped)
        with torch.no_grad():
            slots[order] = grouped
        return (slots.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


RULE = "grad_mode_is_constant"

MISSES = (
    NearMiss("dense_unrecorded_columns", RULE, DenseColumns),
    NearMiss("dense_unrecorded_masked", RULE, DenseMasked),
    NearMiss("dense_unrecorded_stacked", RULE, DenseStacked),
    NearMiss("flat_unrecorded", RULE, FlatWeights),
    NearMiss("paired_unrecorded", RULE, PairedWeights),
    NearMiss("range_unrecorded_by_inference_mode", RULE, InferredWeights),
    NearMiss("segments_put_back_unrecorded", RULE, RowsOfSlots, may_rewrite=True),
)
