"""Parameters that hold more than one product: their halves are taken expert by expert, or before; views of stacks."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E
from tests.zoo.parameters import StackedLoop


class Halves(StackedLoop):
    """`W[e][:F]` and `W[e][F:]`."""

    def halves(self, w, e):
        return w[e][:FF], w[e][FF:]

    def expert(self, x, e):
        gate, up = self.halves(self.experts.gate_up_proj, e)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), self.experts.down_proj[e])


class HalvesInOneIndex(Halves):
    """`W[e, :F]`."""

    def halves(self, w, e):
        return w[e, :FF], w[e, FF:, :]


class Chunks(Halves):
    """`W[e].chunk(2)`."""

    def halves(self, w, e):
        return w[e].chunk(2, dim=0)


class EveryOther(Halves):
    """`W[e, ::2]`."""

    def halves(self, w, e):
        return w[e, ::2], w[e, 1::2]


class HalvesOfTheStack(Halves):
    """`W[:, :F][e]`, taken anew for each expert."""

    def halves(self, w, e):
        return w[:, :FF][e], w.narrow(1, FF, FF)[e]


class ThreeToFour(Halves):
    """`W[e].view(2, F, D)`."""

    def halves(self, w, e):
        return w[e].view(2, FF, D).unbind(0)


class Thirds(Halves):
    """Parts that are no halves: some columns belong to both, the last to none."""

    def halves(self, w, e):
        return w[e, : FF - 4], w[e, FF // 2 : FF // 2 + FF - 4]

    def expert(self, x, e):
        gate, up = self.halves(self.experts.gate_up_proj, e)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), self.experts.down_proj[e][:, 4:])


class HalvesOfBiases(Halves):
    """Weights [E, D, 2F] and biases [E, 2F]."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up, self.down = nn.Parameter(torch.empty(E, D, 2 * FF)), nn.Parameter(torch.empty(E, FF, D))
        self.bias = nn.Parameter(torch.empty(E, 2 * FF))

    def expert(self, x, e):
        gate, up = x @ self.up[e][:, :FF] + self.bias[e, :FF], x @ self.up[e][:, FF:] + self.bias[e, FF:]
        return (F.silu(gate) * up) @ self.down[e]


class HitHalves(Halves):
    """In a loop over the experts that have a token."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slots, tokens = torch.where(mask[e[0]])
            out.index_add_(0, tokens, self.expert(x[tokens], e[0]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class Unbound(StackedLoop):
    """`zip(ids..., W.unbind(0))`."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        downs = self.experts.down_proj.unbind()
        for e, gate_up in enumerate(self.experts.gate_up_proj.unbind(0)):
            tokens, slots = torch.where(ids == e)
            gate, up = F.linear(x[tokens], gate_up).chunk(2, dim=-1)
            out.index_add_(0, tokens, F.linear(F.silu(gate) * up, downs[e]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class Enumerated(StackedLoop):
    """`enumerate(W)`."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        for e, (gate_up, down) in enumerate(zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True)):
            tokens, slots = torch.where(ids == e)
            gate, up = F.linear(x[tokens], gate_up).chunk(2, dim=-1)
            out.index_add_(0, tokens, F.linear(F.silu(gate) * up, down) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class Segments(StackedLoop):
    """Weights [E * F, D], of which each expert has a segment: by slices, and by `chunk` and `squeeze` (dbrx)."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up, self.down = nn.Parameter(torch.empty(E * FF, D)), nn.Parameter(torch.empty(E * FF, D))

    def expert(self, x, e):
        up, down = self.up[e * FF : (e + 1) * FF], self.down.view(E, FF, D).chunk(E)[e].squeeze(0)
        return F.silu(x @ up.t()) @ down


class ExpertsLast(StackedLoop):
    """Experts along the last dim, and along the second."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up, self.down = nn.Parameter(torch.empty(2 * FF, D, E)), nn.Parameter(torch.empty(D, E, FF))

    def expert(self, x, e):
        gate, up = F.linear(x, self.up[..., e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down[:, e])


class HalvesOfModules(StackedLoop):
    """Of the weights of linear layers."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.ups = nn.ModuleList(nn.Linear(D, 2 * FF) for _ in range(E))
        self.downs = nn.ModuleList(nn.Linear(FF, D) for _ in range(E))

    def expert(self, x, e):
        w, b = self.ups[e].weight, self.ups[e].bias
        return self.downs[e](F.silu(F.linear(x, w[:FF], b[:FF])) * F.linear(x, w[FF:], b[FF:]))


CASES = (
    Case("views_halves", Halves),
    Case("views_halves_in_one_index", HalvesInOneIndex),
    Case("views_chunks", Chunks),
    Case("views_every_other", EveryOther),
    Case("views_halves_of_the_stack", HalvesOfTheStack),
    Case("views_three_to_four", ThreeToFour),
    Case("views_thirds", Thirds),
    Case("views_halves_of_biases", HalvesOfBiases),
    Case("views_hit_halves", HitHalves),
    Case("views_unbound", Unbound),
    Case("views_enumerated", Enumerated),
    Case("views_segments", Segments, op=None),
    Case("views_experts_last", ExpertsLast),
    Case("views_halves_of_modules", HalvesOfModules),
)
