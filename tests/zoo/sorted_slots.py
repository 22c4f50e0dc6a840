"""All slots sorted by expert at once and grouped products over them, as in transformers 5."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K


def grouped_mm(rows, weight, offsets):
    """torch's, which can be traced in bfloat16 alone, or what transformers has for other dtypes."""
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offs=offsets)


class SortedExperts(nn.Module):
    """gate_up_proj [E, 2F, D] and down_proj [E, D, F]; the steps apart, for variants to replace."""

    def __init__(self):
        super().__init__()
        pytest.importorskip("transformers.integrations.moe", reason="registers the operator for other dtypes")
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * FF, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, FF))

    def sort(self, ids):
        return torch.sort(ids.reshape(-1))

    def offsets(self, experts):
        counts = torch.histc(experts.float(), bins=E, min=0, max=E - 1)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)

    def rows(self, x, order, experts, offsets):
        gate, up = grouped_mm(x[order // K], self.gate_up_proj.transpose(-2, -1), offsets).chunk(2, dim=-1)
        return grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offsets)

    def weigh(self, rows, weights, order):
        return rows * weights.reshape(-1)[order].unsqueeze(-1)

    def put_back(self, rows, order):
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=order.device)
        return rows[inverse]

    def add_up(self, rows, tokens):
        return rows.view(tokens, K, D).sum(dim=1)

    def forward(self, x, ids, weights):
        experts, order = self.sort(ids)
        rows = self.rows(x, order, experts, self.offsets(experts))
        rows = self.put_back(self.weigh(rows, weights, order), order)
        return self.add_up(rows, x.size(0)).to(x.dtype)


class ArgsortExperts(SortedExperts):
    """Orders by argsort, rows by index_select, ReLU instead of a gate."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, FF, D))

    def rows(self, x, order, experts, offsets):
        tokens = torch.div(order, K, rounding_mode="floor")
        h = grouped_mm(x.index_select(0, tokens), self.gate_up_proj.transpose(1, 2), offsets)
        return grouped_mm(F.relu(h), self.down_proj.mT, offsets)

    def put_back(self, rows, order):
        return rows.index_select(0, torch.argsort(order))


class NormedExperts(SortedExperts):
    """A norm over each expert's output, with a scale of its own: no MLP that one op computes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(E, D))

    def rows(self, x, order, experts, offsets):
        rows = super().rows(x, order, experts, offsets)
        return F.rms_norm(rows, (D,), eps=1e-6) * self.scale[experts]


class UnderAutocast(SortedExperts):
    """Autocast leaves grouped_mm alone: fp32 experts stay fp32."""

    def forward(self, x, ids, weights):
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x, ids, weights)


class ParallelExperts(SortedExperts):
    """Expert-parallel: [E, in, out] with biases, and ids of E for the experts of other ranks."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * FF))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * FF))
        self.down_proj = nn.Parameter(torch.empty(E, FF, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))

    def rows(self, x, order, experts, offsets):
        absent = (experts >= E).unsqueeze(-1)
        experts.clamp_(max=E - 1)
        bias = self.gate_up_proj_bias[experts]
        rows = x[order // K]
        rows.masked_fill_(absent, 0.0)
        h = grouped_mm(rows, self.gate_up_proj, offsets)
        h.add_(bias)
        gate, up = h.masked_fill(absent, 0.0).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, self.down_proj, offsets)
        y.add_(self.down_proj_bias[experts])
        return y.masked_fill(absent, 0.0)


class SortedBlock(nn.Module):
    """A softmax router over all experts, of which those from E on are elsewhere."""

    def __init__(self, experts: type[nn.Module] = SortedExperts, elsewhere=0):
        super().__init__()
        self.gate = nn.Linear(D, E + elsewhere, bias=False)
        self.experts = experts()

    def route(self, x):
        """Return topk_ids_TK and topk_weights_TK."""
        probs = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        weights, ids = torch.topk(probs, K, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.gate.out_features > E:
            weights, ids = weights.masked_fill(ids >= E, 0.0), ids.clamp(max=E)
        return ids, weights.to(x.dtype)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        return self.experts(x, *self.route(x)).view(hidden_states.shape)


CASES = (
    Case("sorted_slots_under_autocast", lambda: SortedBlock(UnderAutocast)),
    Case("sorted_slots", SortedBlock),
    Case("sorted_slots_argsort", lambda: SortedBlock(ArgsortExperts), activation="relu"),
    Case("sorted_slots_norm", lambda: SortedBlock(NormedExperts), activation="any", op="parallel_linear"),
    Case("sorted_slots_expert_parallel", lambda: SortedBlock(ParallelExperts, elsewhere=2)),
)
