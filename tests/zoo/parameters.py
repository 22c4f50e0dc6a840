"""Ways in which an expert's own parameters are taken and multiplied with."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E
from tests.zoo.stacked import StackedExperts, TopKRouter


class StackedLoop(nn.Module):
    """A range loop over stacked weights, of which subclasses write one expert."""

    def __init__(self):
        super().__init__()
        self.gate = TopKRouter(num_experts=E)
        self.experts = StackedExperts()

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class Taken(StackedLoop):
    """Cast to the dtype of the rows, with all dims named."""

    def expert(self, x, e):
        gate, up = F.linear(x, self.experts.gate_up_proj[e, :, :].to(x.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.experts.down_proj[e, ...].type_as(x))


class Biases(StackedLoop):
    """Biases as rows of one: `[e][None]`, `[e, None]`, `[e].unsqueeze(0)`."""

    def __init__(self):
        super().__init__()
        self.up_bias = nn.Parameter(torch.empty(E, 2 * FF))
        self.down_bias = nn.Parameter(torch.empty(E, D))

    def up(self, x, e):
        return x @ self.experts.gate_up_proj[e].t() + self.up_bias[e][None]

    def down(self, h, e):
        return torch.mm(h, self.experts.down_proj[e].t()) + self.down_bias[e, None]

    def expert(self, x, e):
        gate, up = self.up(x, e).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, e)


class Addmm(Biases):
    """Bias and product at once."""

    def up(self, x, e):
        return torch.addmm(self.up_bias[e].unsqueeze(0), x, self.experts.gate_up_proj[e].t())

    def down(self, h, e):
        return torch.addmm(self.down_bias[e], h, self.experts.down_proj[e].t())


class Einsums(StackedLoop):
    """Products by einsum."""

    def expert(self, x, e):
        gate, up = torch.einsum("td,fd->tf", x, self.experts.gate_up_proj[e]).chunk(2, dim=-1)
        return torch.einsum("tf, fd -> td", F.silu(gate) * up, self.experts.down_proj[e].t())


CASES = (
    Case("parameters_taken", Taken),
    Case("parameters_biases", Biases),
    Case("parameters_addmm", Addmm),
    Case("parameters_einsum", Einsums),
)
