"""Qwen2-MoE (a shared expert behind a sigmoid gate), Qwen3-MoE and OLMoE: range and hit loops."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj x) * up_proj x)."""

    def __init__(self, hidden=FF):
        super().__init__()
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Qwen2Moe445(Block):
    """range(E) loop, then the shared expert on all tokens."""

    def __init__(self):
        super().__init__(expert=GatedMLP, normalize=False)
        self.shared_expert = GatedMLP(2 * FF)
        self.shared_expert_gate = nn.Linear(D, 1, bias=False)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits, ids, weights = self.route(hidden_states)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            idx, top_x = torch.where(expert_mask[e])
            state = hidden_states[None, top_x].reshape(-1, width)
            state = self.experts[e](state) * weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        shared = F.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)
        out = out + shared
        return out.reshape(batch, length, width), logits


class Qwen2Moe457(Qwen2Moe445):
    """Hit loop, the same shared expert."""

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits, ids, weights = self.route(hidden_states)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero():
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            state = hidden_states[None, top_x].reshape(-1, width)
            out.index_add_(0, top_x, (expert_layer(state) * weights[top_x, idx, None]).to(hidden_states.dtype))
        out = out + F.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)
        return out.reshape(batch, length, width), logits


class Qwen3Moe(Block):
    """Hit loop over a ModuleList; the caller sees the router logits."""

    def __init__(self):
        super().__init__(expert=GatedMLP, num_experts=8, top_k=3)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits, ids, weights = self.route(hidden_states)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            state = hidden_states[None, top_x].reshape(-1, width)
            state = self.experts[expert_idx](state) * weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out.reshape(batch, length, width), logits


class Olmoe(Block):
    """range(E) loop over a ModuleList; softmax weights are not renormalised."""

    def __init__(self):
        super().__init__(expert=GatedMLP, num_experts=6, top_k=3, normalize=False)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits, ids, weights = self.route(hidden_states)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            state = hidden_states[None, top_x].reshape(-1, width)
            state = expert_layer(state) * weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out.reshape(batch, length, width), logits


CASES = (
    Case("qwen2_moe_445", Qwen2Moe445),
    Case("qwen2_moe_457", Qwen2Moe457),
    Case("qwen3_moe_451", Qwen3Moe, num_experts=8, top_k=3),
    Case("olmoe_445", Olmoe, num_experts=6, top_k=3),
)
