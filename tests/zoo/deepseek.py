"""DeepSeek-V2 and V3: enumerate(experts), numel guards, grouped sigmoid routing, shared experts, counted experts."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D
from tests.zoo.qwen import GatedMLP


class GroupedSigmoidRouter(nn.Module):
    """DeepSeek-V3's no-aux-loss router: best groups first, a correction bias that picks but does not weigh."""

    def __init__(self, num_experts=8, top_k=3, num_groups=4, top_groups=2, scaling=2.5):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.num_groups, self.top_groups, self.scaling = num_groups, top_groups, scaling
        self.weight = nn.Parameter(torch.empty(num_experts, D))
        self.register_buffer("correction_bias", torch.linspace(-0.2, 0.2, num_experts))

    @torch.no_grad()
    def choose(self, scores):
        biased = scores.view(-1, self.num_experts) + self.correction_bias.unsqueeze(0)
        per_group = self.num_experts // self.num_groups
        group_scores = biased.view(-1, self.num_groups, per_group).topk(2, dim=-1)[0].sum(dim=-1)
        group_ids = torch.topk(group_scores, k=self.top_groups, dim=-1, sorted=False)[1]
        group_mask = torch.zeros_like(group_scores)
        group_mask.scatter_(1, group_ids, 1)
        mask = group_mask.unsqueeze(-1).expand(-1, self.num_groups, per_group).reshape(-1, self.num_experts)
        biased = biased.masked_fill(~mask.bool(), 0.0)
        return torch.topk(biased, k=self.top_k, dim=-1, sorted=False)[1]

    def forward(self, hidden_states):
        hidden_states = hidden_states.view(-1, D)
        logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))
        scores = logits.sigmoid()
        ids = self.choose(scores)
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, weights * self.scaling


class DeepseekV3(nn.Module):
    """transformers 4.5x: an fp32 accumulator of the weights' dtype, [E, T, K] masks, numel guard."""

    def __init__(self):
        super().__init__()
        self.gate = GroupedSigmoidRouter()
        self.experts = nn.ModuleList([GatedMLP() for _ in range(self.gate.num_experts)])
        self.shared_experts = GatedMLP(2 * FF)

    def moe(self, hidden_states, topk_indices, topk_weights):
        out = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
        expert_mask = F.one_hot(topk_indices, num_classes=len(self.experts)).permute(2, 0, 1)
        for expert_idx in range(len(self.experts)):
            expert = self.experts[expert_idx]
            mask = expert_mask[expert_idx]
            token_indices, weight_indices = torch.where(mask)
            if token_indices.numel() > 0:
                expert_weights = topk_weights[token_indices, weight_indices]
                expert_output = expert(hidden_states[token_indices])
                out.index_add_(0, token_indices, expert_output * expert_weights.unsqueeze(-1))
        return out.type(hidden_states.dtype)

    def forward(self, hidden_states):
        residuals, shape = hidden_states, hidden_states.shape
        ids, weights = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, shape[-1])
        hidden_states = self.moe(hidden_states, ids, weights).view(*shape)
        return hidden_states + self.shared_experts(residuals)


class DeepseekV3Enumerate(DeepseekV3):
    """`for i, expert in enumerate(experts)` with `ids == i` and a guard on numel."""

    def moe(self, hidden_states, topk_indices, topk_weights):
        out = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self.experts):
            token_idx, slot = (topk_indices == i).nonzero(as_tuple=True)
            if token_idx.numel() > 0:
                weighted = expert(hidden_states[token_idx]) * topk_weights[token_idx, slot, None]
                out.index_add_(0, token_idx, weighted.to(out.dtype))
        return out


class DeepseekReference(DeepseekV3):
    """The authors' own inference code: counts as guards, `y[idx] +=`."""

    def moe(self, hidden_states, topk_indices, topk_weights):
        y = torch.zeros_like(hidden_states)
        counts = torch.bincount(topk_indices.flatten(), minlength=len(self.experts)).tolist()
        for i in range(len(self.experts)):
            if counts[i] == 0:
                continue
            expert = self.experts[i]
            idx, top = torch.where(topk_indices == i)
            y[idx] += expert(hidden_states[idx]) * topk_weights[idx, top, None].to(y.dtype)
        return y


class DeepseekLocal(DeepseekReference):
    """One rank of several: it holds experts 2 to 5 and leaves zeros for the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = 2, 6
        for i in (*range(self.first), *range(self.last, len(self.experts))):
            self.experts[i] = None

    def moe(self, hidden_states, topk_indices, topk_weights):
        y = torch.zeros_like(hidden_states)
        counts = torch.bincount(topk_indices.flatten(), minlength=len(self.experts)).tolist()
        for i in range(self.first, self.last):
            if counts[i] == 0:
                continue
            idx, top = torch.where(topk_indices == i)
            y[idx] += self.experts[i](hidden_states[idx]) * topk_weights[idx, top, None]
        return y


class DeepseekV2Train(DeepseekV3):
    """The V2 training path: every token repeated K times, each expert writes its rows of a flat buffer."""

    def moe(self, hidden_states, topk_indices, topk_weights):
        top_k = topk_indices.shape[-1]
        flat_ids = topk_indices.view(-1)
        repeated = hidden_states.repeat_interleave(top_k, dim=0)
        y = torch.empty_like(repeated)
        for i, expert in enumerate(self.experts):
            y[flat_ids == i] = expert(repeated[flat_ids == i])
        y = (y.view(*topk_weights.shape, -1) * topk_weights.unsqueeze(-1)).sum(dim=1)
        return y.to(hidden_states.dtype)


class DeepseekV2Infer(DeepseekV3):
    """The V2 inference path: sort by expert, walk the segments, undo the sort."""

    def moe(self, hidden_states, topk_indices, topk_weights):
        counts = topk_indices.new_zeros((topk_indices.shape[0], len(self.experts)))
        counts.scatter_(1, topk_indices, 1)
        tokens_per_expert = counts.sum(dim=0).tolist()
        order = topk_indices.view(-1).argsort()
        rows = hidden_states[order // topk_indices.shape[1]]
        outputs, start = [], 0
        for i, count in enumerate(tokens_per_expert):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[i](rows[start:end]))
            start = end
        grouped = torch.cat(outputs, dim=0)
        unsorted = torch.empty_like(grouped)
        unsorted[order] = grouped
        unsorted = unsorted.view(*topk_indices.shape, -1).type(topk_weights.dtype)
        return unsorted.mul_(topk_weights.unsqueeze(dim=-1)).sum(dim=1).type(hidden_states.dtype)


CASES = (
    Case("deepseek_v3_457", DeepseekV3, num_experts=8, top_k=3),
    Case("deepseek_v3_enumerate", DeepseekV3Enumerate, num_experts=8, top_k=3),
    Case("deepseek_reference", DeepseekReference, num_experts=8, top_k=3),
    Case("deepseek_local", DeepseekLocal, num_experts=4, top_k=3),
    Case("deepseek_v2_train", DeepseekV2Train, num_experts=8, top_k=3),
    Case("deepseek_v2_infer", DeepseekV2Infer, num_experts=8, top_k=3),
)
