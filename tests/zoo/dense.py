"""Every expert on every token at once, weights zero outside the top-k: llama4, einsum over all experts."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K


class DenseExperts(nn.Module):
    """Experts [E, in, out] by einsum on [T, E]; weights by a product and a sum. The steps apart, for variants."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * FF))
        self.down_proj = nn.Parameter(torch.empty(E, FF, D))

    def activate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def add_up(self, y, table):
        return (y * table.unsqueeze(-1)).sum(dim=1)

    def forward(self, x, table):
        h = self.activate(torch.einsum("td,edf->tef", x, self.gate_up_proj))
        return self.add_up(torch.einsum("tef,efd->ted", h, self.down_proj), table)


class TransposedExperts(DenseExperts):
    """Experts [E, out, in], dims [E, T], the sum by einsum."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * FF, D))

    def forward(self, x, table):
        h = self.activate(torch.einsum("td,efd->etf", x, self.gate_up_proj))
        return torch.einsum("etd,te->td", h @ self.down_proj, table)


class WeightedInputs(DenseExperts):
    """llama4: repeated tokens, each multiplied by its weight before the experts."""

    def forward(self, x, table):
        rows = x.repeat(E, 1) * table.transpose(0, 1).reshape(-1, 1)
        h = self.activate(torch.bmm(rows.view(E, -1, D), self.gate_up_proj))
        return torch.bmm(h, self.down_proj).view(-1, D).reshape(E, -1, D).sum(dim=0)


class AddedByNumber(WeightedInputs):
    """llama4 of transformers 4.51: tokens picked by number for all experts at once, and added up by number."""

    def numbers(self, x):
        return torch.arange(len(x), device=x.device).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, D)

    def start(self, x):
        return F.silu(x)

    def put_back(self, y, x):
        return self.start(x).scatter_add_(0, self.numbers(x), y.view(-1, D))

    def forward(self, x, table):
        rows = x.gather(0, self.numbers(x)) * table.reshape(-1, 1)
        h = self.activate(torch.bmm(rows.view(E, -1, D), self.gate_up_proj))
        return self.put_back(torch.bmm(h, self.down_proj), x)


class PickedByNumber(AddedByNumber):
    """The same with one index."""

    def numbers(self, x):
        return torch.arange(len(x), device=x.device).repeat(E)

    def forward(self, x, table):
        rows = x[self.numbers(x)] * table.reshape(-1, 1)
        h = self.activate(torch.bmm(rows.view(E, -1, D), self.gate_up_proj))
        return torch.zeros_like(x).index_add(0, self.numbers(x), torch.bmm(h, self.down_proj).view(-1, D))


class DenseBlock(nn.Module):
    """A router whose weights are a table [T, E]: zeros, and the softmax of the top-k scattered into them."""

    def __init__(self, experts: type[nn.Module] = DenseExperts):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = experts()

    def table(self, logits):
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(1, ids, weights / weights.sum(dim=-1, keepdim=True))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        return self.experts(x, self.table(self.gate(x))).view(hidden_states.shape)


class MaskedSoftmax(DenseBlock):
    """-inf outside the top-k, then a softmax over all."""

    def table(self, logits):
        _, ids = logits.topk(K, dim=-1)
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        return F.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)


class ScatteredSigmoid(DenseBlock):
    """llama4: the top-k logits scattered into -inf, then a sigmoid."""

    def table(self, logits):
        values, ids = torch.topk(logits, K, dim=1)
        return torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, ids, values).float()).to(logits.dtype)


class TransposedSigmoid(DenseBlock):
    """llama4 of transformers 4.51: the sigmoid of a transposed table, [E, T]."""

    def table(self, logits):
        values, ids = torch.topk(logits, K, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values).transpose(0, 1)
        return torch.sigmoid(scores.float()).to(logits.dtype)


class MaskedProduct(DenseBlock):
    """Probabilities times a mask, normalised."""

    def table(self, logits):
        probs = F.softmax(logits, dim=-1)
        mask = torch.zeros_like(probs)
        mask.scatter_(1, probs.topk(K, dim=-1).indices, 1.0)
        table = probs * mask
        return table / table.sum(dim=-1, keepdim=True)


CASES = (
    Case("dense_einsum", DenseBlock),
    Case("dense_einsum_transposed", lambda: MaskedProduct(TransposedExperts), activation="any", op="parallel_linear"),
    Case("dense_masked_softmax", MaskedSoftmax),
    Case("dense_llama4", lambda: ScatteredSigmoid(WeightedInputs)),
    Case("dense_added_by_number", lambda: TransposedSigmoid(AddedByNumber)),
    Case("dense_picked_by_number", lambda: TransposedSigmoid(PickedByNumber)),
)
