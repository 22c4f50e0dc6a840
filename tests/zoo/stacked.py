"""transformers 5.x: experts stacked in 3-D parameters, a hit loop, an index for "no expert" that is skipped."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K


class StackedExperts(nn.Module):
    """gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""

    def __init__(self, num_experts=E):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * FF, D))
        self.down_proj = nn.Parameter(torch.empty(num_experts, D, FF))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1)
            expert_mask = expert_mask.permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            state = hidden_states[token_idx]
            gate, up = F.linear(state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            state = self.act_fn(gate) * up
            state = F.linear(state, self.down_proj[expert_idx])
            state = state * top_k_weights[token_idx, top_k_pos, None]
            out.index_add_(0, token_idx, state.to(out.dtype))
        return out


class StackedExpertsNoSentinel(StackedExperts):
    """The first 5.x releases: num_classes is E and nothing is skipped."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        num_experts = top_k_weights.shape[1] if self.num_experts is None else self.num_experts
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=num_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            gate, up = F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            state = F.linear(self.act_fn(gate) * up, self.down_proj[expert_idx])
            state = state * top_k_weights[token_idx, top_k_pos, None]
            out.index_add_(0, token_idx, state.to(out.dtype))
        return out


class StackedRange(StackedExperts):
    """The same parameters under a plain range(E) loop, with `x @ w.T`."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token_idx, slot = torch.where(top_k_index == e)
            gate, up = (hidden_states[token_idx] @ self.gate_up_proj[e].T).chunk(2, dim=-1)
            state = (F.silu(gate) * up) @ self.down_proj[e].T
            out.index_add_(0, token_idx, state * top_k_weights[token_idx, slot, None])
        return out


class StackedNoGate(nn.Module):
    """up_proj and down_proj alone with relu^2 (Nemotron-H)."""

    def __init__(self, num_experts=E):
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, FF, D))
        self.down_proj = nn.Parameter(torch.empty(num_experts, D, FF))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            state = F.linear(hidden_states[token_idx], self.up_proj[expert_idx])
            state = F.linear(F.relu(state).square(), self.down_proj[expert_idx])
            state = state * top_k_weights[token_idx, top_k_pos, None]
            out.index_add_(0, token_idx, state.to(out.dtype))
        return out.to(hidden_states.dtype)


class StackOfOne(nn.Module):
    """The expert's number keeps a dim: its rows are a stack of one matrix (qwen3_vl_moe 4.57)."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * FF))
        self.down_proj = nn.Parameter(torch.empty(E, FF, D))

    def activate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return up * F.silu(gate)

    def taken(self, y):
        return y[0]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        table = torch.zeros(len(hidden_states), E, device=hidden_states.device, dtype=top_k_weights.dtype)
        table = table.scatter_(1, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=E).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit[:]:
            with torch.no_grad():
                _, token_idx = torch.where(expert_mask[expert_idx[0]])
            state = self.activate(hidden_states[token_idx] @ self.gate_up_proj[expert_idx])
            state = self.taken(state @ self.down_proj[expert_idx]) * table[token_idx, expert_idx, None]
            out.index_add_(0, token_idx, state.to(out.dtype))
        return out


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, renormalised top-k."""

    def __init__(self, num_experts=E, top_k=K, normalize=True):
        super().__init__()
        self.top_k, self.normalize = top_k, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, D))

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, D)
        logits = F.linear(hidden_states, self.weight)
        probs = F.softmax(logits, dtype=torch.float, dim=-1)
        weights, ids = torch.topk(probs, self.top_k, dim=-1)
        if self.normalize:
            weights /= weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids


class StackedBlock(nn.Module):
    """Router, experts, reshape: the block around any experts(hidden_states, top_k_index, top_k_weights)."""

    def __init__(self, experts=StackedExperts, **router):
        super().__init__()
        self.gate = TopKRouter(**router)
        self.experts = experts()

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, shape[-1])
        _, weights, ids = self.gate(hidden_states)
        return self.experts(hidden_states, ids, weights).reshape(shape)


CASES = (
    Case("stacked_sentinel", StackedBlock),
    Case("stacked_unnormalized", lambda: StackedBlock(normalize=False)),
    Case("stacked_top_1", lambda: StackedBlock(top_k=1, normalize=False), top_k=1),
    Case("stacked_top_all", lambda: StackedBlock(top_k=E), top_k=E),
    Case("stacked_no_sentinel", lambda: StackedBlock(StackedExpertsNoSentinel)),
    Case("stacked_range", lambda: StackedBlock(StackedRange)),
    Case("stacked_of_one", lambda: StackedBlock(StackOfOne)),
    Case("stacked_relu2", lambda: StackedBlock(StackedNoGate), activation="relu2"),
)
