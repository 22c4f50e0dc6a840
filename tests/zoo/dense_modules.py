"""Experts that are modules, each on every token: sums of weighted outputs, stacked outputs; [T, D] and [B, S, D]."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, E, K
from tests.zoo.masks import MaskLoop


class Dense(Block):
    """A table [..., E] that is zero outside the top-k; subclasses add up. Tokens keep their dims."""

    def table(self, logits):
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(-1, ids, weights / weights.sum(dim=-1, keepdim=True))

    def forward(self, x):
        return self.add_up(x, self.table(self.gate(x)))


class Normalized(Dense):
    """Softmax over all, masked, and normalised to a sum of one; outputs are stacked, and contracted by einsum."""

    def table(self, logits):
        probs = F.softmax(logits, dim=-1)
        mask = torch.zeros_like(probs).scatter_(-1, probs.topk(K, dim=-1).indices, 1.0)
        return F.normalize(probs * mask, p=1, dim=-1)

    def add_up(self, x, table):
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1).transpose(1, 2)
        return torch.einsum("bte,bted->btd", table, outputs)


class SumOfProducts(Dense):
    """Python's sum over a generator."""

    def add_up(self, x, table):
        return sum(table[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class AddedInPlace(Dense):
    """-inf outside the top-k, columns by unbind, `out +=`."""

    def table(self, logits):
        values, ids = logits.topk(K, dim=-1)
        return torch.full_like(logits, float("-inf")).scatter(-1, ids, values).softmax(dim=-1)

    def add_up(self, x, table):
        out = torch.zeros_like(x)
        for weight, expert in zip(table.unbind(dim=-1), self.experts, strict=True):
            out += weight.unsqueeze(-1) * expert(x)
        return out


class FilledLate(Block):
    """The table is made and filled in place when all experts have run."""

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        logits = self.gate(x)
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        table = self.fill(torch.zeros_like(logits), ids, weights, outputs)
        return (outputs * table.unsqueeze(-1)).sum(dim=-2)

    def fill(self, table, ids, weights, outputs):
        return table.scatter_(-1, ids, weights)


class BesideShared(Dense):
    """Added to what an expert of all tokens computes, from a transposed table, on flat tokens."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(D, D)

    def add_up(self, x, table):
        x, columns = x.reshape(-1, D), table.reshape(-1, E).t()
        out = self.shared(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * columns[e].unsqueeze(-1)
        return out


class MaskedWeights(Block):
    """The weight of an expert is the sum of the weights of its slots."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (ids == e)).sum(dim=-1, keepdim=True)
        return out.view_as(hidden_states)


class Where(Block):
    """A mask keeps what the experts make of the tokens that chose them, times any scores; tokens in two dims."""

    def forward(self, x):
        scores = self.gate(x).softmax(dim=-1)
        ids = scores.topk(K, dim=-1).indices
        return self.add_up(x, scores, ids)

    def add_up(self, x, scores, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + torch.where((ids == e).any(dim=-1, keepdim=True), expert(x) * scores[..., e : e + 1], 0)
        return out


class WhereNot(Where):
    """Zero where a token did not choose the expert."""

    def add_up(self, x, scores, ids):
        return sum(
            torch.where(~(ids == e).any(dim=-1, keepdim=True), 0, expert(x) * scores[..., e : e + 1])
            for e, expert in enumerate(self.experts)
        )


class KeptScores(Where):
    """The mask stands by the scores, of flat tokens."""

    def add_up(self, x, scores, ids):
        x, scores, ids = x.reshape(-1, D), scores.reshape(-1, E), ids.reshape(-1, K)
        return sum(
            expert(x) * (scores[:, e] * (ids == e).any(dim=1)).unsqueeze(-1) for e, expert in enumerate(self.experts)
        )


class WhereTopOne(Where):
    """One choice a token, and its weight; what is not kept are fresh zeros. Tokens in one dim."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        weights, ids = self.gate(x).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = expert(x) * weights.unsqueeze(-1)
            out += torch.where((ids == e).unsqueeze(-1), y, torch.zeros_like(y))
        return out.view_as(hidden_states)


class StackedEinsum(Dense):
    """Outputs stacked between tokens and features, summed by einsum."""

    def add_up(self, x, table):
        return torch.einsum("bse,bsed->bsd", table, torch.stack([expert(x) for expert in self.experts], dim=2))


class StackedProduct(Dense):
    """Outputs stacked in front, a product and a sum; cat of outputs with a dim of their own."""

    def add_up(self, x, table):
        outputs = torch.cat([expert(x).unsqueeze(0) for expert in self.experts], dim=0)
        return (outputs * table.permute(2, 0, 1).unsqueeze(-1)).sum(dim=0)


class StackedMatmul(Dense):
    """A row of weights times the stacked outputs."""

    def add_up(self, x, table):
        x, table = x.reshape(-1, D), table.reshape(-1, E)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.bmm(table.unsqueeze(1), outputs).squeeze(1)


class GatheredOutputs(Dense):
    """The chosen ones of stacked outputs, [B, S, K, D]."""

    def forward(self, x):
        weights, ids = self.gate(x).topk(K, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        chosen = outputs.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, D))
        return (chosen * weights.softmax(dim=-1).unsqueeze(-1)).sum(dim=2)


class IndexedOutputs(Block):
    """The same by indexing with pairs."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs[torch.arange(x.shape[0])[:, None], ids]
        return torch.einsum("tkd,tk->td", chosen, weights).view_as(hidden_states)


class NormedMLP(nn.Module):
    """Steps along the features, of [B, S, D] as of [T, D]: slices, a norm, a reshape, a softmax."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, 2 * FF)
        self.down = nn.Linear(FF, D)

    def forward(self, x):
        h = self.up(self.norm(x))
        h = h[..., :FF] * torch.softmax(h[..., FF:], dim=x.dim() - 1)
        h = h.view(*h.shape[:-1], 3, FF // 3) * h.view(*h.shape[:-1], 3, FF // 3).mean(dim=-2, keepdim=True)
        return self.down(h.flatten(-2))


class OneHotTable(MaskLoop):
    """The table as one-hot rows times the weights, summed over slots."""

    def moe(self, x, ids, weights):
        table = (F.one_hot(ids, self.num_experts).to(x.dtype) * weights.unsqueeze(-1)).sum(-2)
        out = 0
        for e, expert in enumerate(self.experts):
            out = out + table[:, e, None] * expert(x)
        return out


class OneHotContracted(MaskLoop):
    """The same by an einsum, and the outputs stacked."""

    def moe(self, x, ids, weights):
        table = torch.einsum("tke,tk->te", F.one_hot(ids, self.num_experts).to(x.dtype), weights)
        outputs = torch.stack([expert(x) for expert in self.experts], 0)
        return torch.einsum("etd,te->td", outputs, table)


CASES = (
    Case("dense_modules_sum", SumOfProducts),
    Case("dense_modules_in_place", AddedInPlace),
    Case("dense_modules_filled_late", FilledLate),
    Case("dense_modules_beside_shared", BesideShared),
    Case("dense_modules_masked", MaskedWeights),
    Case("dense_modules_where", Where),
    Case("dense_modules_where_not", WhereNot),
    Case("dense_modules_kept_scores", KeptScores),
    Case("dense_modules_where_top_1", WhereTopOne, top_k=1),
    Case("dense_modules_einsum", StackedEinsum),
    Case("dense_modules_product", StackedProduct),
    Case("dense_modules_matmul", StackedMatmul),
    Case("dense_modules_gather", GatheredOutputs),
    Case("dense_modules_index", IndexedOutputs),
    Case("dense_modules_norm", lambda: SumOfProducts(NormedMLP), activation="any", op="parallel_linear"),
    Case("dense_modules_one_hot", OneHotTable),
    Case("dense_modules_one_hot_einsum", OneHotContracted),
    Case("dense_modules_normalized", Normalized),
)
