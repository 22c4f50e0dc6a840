"""Ways to write the loop itself: guards, `+=`, zip, lists of experts, accumulators, dense sums."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, SwiGLU


class AnyGuard(Block):
    """`if mask.any():` around a boolean mask per expert, `+=` on rows picked by nonzero."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                tokens, slots = torch.where(mask)
                out[tokens] += expert(x[tokens]) * weights[tokens, slots].unsqueeze(-1)
        return out.view_as(hidden_states)


class AnyGuardContinue(Block):
    """`if not mask.any(): continue`, index_add_."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            mask = ids == e
            if not mask.any():
                continue
            tokens, slots = mask.nonzero(as_tuple=True)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class SumGuard(Block):
    """`if mask.sum() == 0: continue`."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.sum() == 0:
                continue
            tokens, slots = torch.where(mask)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class LenGuard(Block):
    """`if len(tokens) == 0: continue` and an out-of-place index_add."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens) == 0:
                continue
            out = out.index_add(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class PlusEquals(Block):
    """`out[tokens] += ...` without any guard: ids of a row are distinct."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += weights[tokens, slots, None] * self.experts[e](x[tokens])
        return out.view_as(hidden_states)


class ZipMasks(Block):
    """zip over the experts and their masks."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        masks = F.one_hot(ids, num_classes=self.num_experts).permute(2, 0, 1)
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, masks, strict=True):
            tokens, slots = mask.nonzero(as_tuple=True)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class HitFlatten(Block):
    """The hit experts as a flat tensor; the loop variable is a 0-d tensor."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten():
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class HitToList(Block):
    """The hit experts as Python integers."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero().flatten().tolist():
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class HitUnpacked(Block):
    """`for (e,) in hit:`."""

    def hits(self, counts):
        return (counts > 0).nonzero()

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for (e,) in self.hits(mask.sum(dim=(-1, -2))):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class HitColumn(HitUnpacked):
    """The only column of what nonzero() lists."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in self.hits(mask.sum(dim=(-1, -2)))[:, 0]:
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class HitWhere(Block):
    """`torch.where(counts > 0)[0]`."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in torch.where(ids.flatten().bincount(minlength=self.num_experts) > 0)[0]:
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class UniqueIds(Block):
    """`for e in ids.unique():`."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in ids.unique():
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class WeightOnInput(Block):
    """The router weight multiplies the expert's input (llama4)."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens] * weights[tokens, slots, None]))
        return out.view_as(hidden_states)


class Unweighted(Block):
    """No router weight at all: the experts' plain sum."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, _ = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, _ = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]))
        return out.view_as(hidden_states)


class Fp32Accumulator(Block):
    """Weights stay fp32, the accumulator is fp32, one cast at the end."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        weights = weights.float()
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]).float() * weights[tokens, slots, None])
        return out.to(x.dtype).view_as(hidden_states)


class DenseSum(Block):
    """Every expert on every token, times a column that is zero outside the top-k."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[:, e, None] * expert(x)
        return out.view_as(hidden_states)


class StackGather(Block):
    """All experts' outputs stacked, then the chosen ones gathered."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs.gather(1, ids.unsqueeze(-1).expand(-1, -1, D))
        return (chosen * weights.unsqueeze(-1)).sum(dim=1).view_as(hidden_states)


class FlatSorted(Block):
    """argsort, bincount, slices: segments written back and summed over the slots."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=self.num_experts).cumsum(0).cpu().numpy()
        tokens = order // self.top_k
        out = torch.zeros_like(x)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            rows = tokens[start:end]
            y = self.experts[e](x[rows]) * weights.flatten()[order[start:end], None]
            out.scatter_add_(0, rows[:, None].expand(-1, D), y)
        return out.view_as(hidden_states)


class ClosureOverExperts(Block):
    """The loop in a helper function, a local alias of every module."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = dispatch(x, ids, weights, self.experts)
        return out.view_as(hidden_states)


def dispatch(x, ids, weights, experts):
    """A free function with the loop."""
    out = x.new_zeros(x.shape)
    mask = F.one_hot(ids, len(experts)).permute(2, 1, 0)
    for e, expert in enumerate(experts):
        slots, tokens = torch.where(mask[e])
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
    return out


class SigmoidTop(Block):
    """Llama-4 and friends: sigmoid of the top-k logits."""

    def __init__(self):
        super().__init__(expert=lambda: SwiGLU(hidden=FF), top_k=2)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        values, ids = self.gate(x).topk(self.top_k, dim=-1)
        weights = values.sigmoid()
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


CASES = (
    Case("any_guard", AnyGuard),
    Case("any_guard_continue", AnyGuardContinue),
    Case("sum_guard", SumGuard),
    Case("len_guard", LenGuard),
    Case("plus_equals", PlusEquals),
    Case("zip_masks", ZipMasks),
    Case("hit_flatten", HitFlatten),
    Case("hit_unpacked", HitUnpacked),
    Case("hit_column", HitColumn),
    Case("hit_where", HitWhere),
    Case("hit_tolist", HitToList),
    Case("unique_ids", UniqueIds),
    Case("weight_on_input", WeightOnInput, op=None),
    Case("unweighted", Unweighted, op=None),
    Case("fp32_accumulator", Fp32Accumulator, op=None),
    Case("dense_sum", DenseSum),
    Case("stack_gather", StackGather),
    Case("flat_sorted", FlatSorted, must_rewrite=False),
    Case("closure_over_experts", ClosureOverExperts),
    Case("sigmoid_top", SigmoidTop),
)
