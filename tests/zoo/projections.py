"""Two products of all experts with something between them for which all slots come together, as in JetMoE."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K
from tests.zoo.others import ParallelExperts


class GroupingRouter(nn.Module):
    """Routes, sorts and counts, as JetMoE and the first Granite MoE do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, E, bias=False)

    def forward(self, x):
        """Return order_N, tokens_N, weights_N and the number of rows of each expert."""
        logits, ids = self.layer(x).float().topk(K, dim=1)
        weights = torch.softmax(logits, dim=1).type_as(x)
        chosen = torch.zeros([weights.size(0), E], dtype=weights.dtype, device=weights.device).scatter(1, ids, 1)
        sizes = chosen.long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        tokens = order.div(K, rounding_mode="trunc")
        return order, tokens, weights.flatten()[order], sizes


class MixtureOfProjections(nn.Module):
    """As a mixture of attention heads: each slot is projected, then something happens to it, then all come together."""

    def __init__(self):
        super().__init__()
        self.router = GroupingRouter()
        self.input_linear, self.output_linear = ParallelExperts(E, D, FF), ParallelExperts(E, FF, D)

    def source(self, x):
        return x

    def sorted_rows(self, source, tokens):
        return source[tokens]

    def by_slot(self, order, rows, inputs):
        zeros = torch.zeros((rows.shape[0], FF), dtype=rows.dtype, device=rows.device)
        return zeros.index_add(0, order, rows)

    def finish(self, source):
        pass

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        order, tokens, weights, sizes = self.router(x)
        source = self.source(x)
        rows = self.sorted_rows(source, tokens)
        slots = self.by_slot(order, self.input_linear(rows, sizes), rows).view(-1, K, FF)
        slots = F.normalize(slots, dim=-1) + slots.mean(1, keepdim=True)
        y = self.output_linear(slots.reshape(-1, FF)[order], sizes) * weights[:, None]
        zeros = torch.zeros((x.shape[0], D), dtype=y.dtype, device=y.device)
        self.finish(source)
        return zeros.index_add(0, tokens, y).view(hidden_states.shape)


class WrittenRows(MixtureOfProjections):
    """What the rows were taken from is written to after the product, before the backward pass."""

    def source(self, x):
        return x * 2

    def sorted_rows(self, source, tokens):
        return source.index_select(0, tokens)

    def finish(self, source):
        source.mul_(3)


class DetachedRows(MixtureOfProjections):
    """The rows were taken, and their products put back, where nothing is recorded."""

    def sorted_rows(self, source, tokens):
        with torch.no_grad():
            return source[tokens]

    def by_slot(self, order, rows, inputs):
        with torch.no_grad():
            slots = super().by_slot(order, rows, inputs)
        return slots + rows.mean()


class OtherPlaces(MixtureOfProjections):
    """Rows are taken in another order than that of the segments, and added to what isn't zero."""

    def sorted_rows(self, source, tokens):
        return source[tokens.flip(0)]

    def by_slot(self, order, rows, inputs):
        return torch.ones_like(rows).index_add(0, order, rows)


class TwoReaders(MixtureOfProjections):
    """Sorted rows, and products in their order, are read twice."""

    def by_slot(self, order, rows, inputs):
        return super().by_slot(order, rows, inputs) + rows.mean() + inputs.mean()


CASES = (
    Case("segments_projections", MixtureOfProjections, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_written", WrittenRows, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_detached", DetachedRows, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_elsewhere", OtherPlaces, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_read_twice", TwoReaders, regions=2, op="parallel_linear", activation="any"),
)
