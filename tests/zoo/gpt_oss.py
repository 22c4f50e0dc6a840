"""GPT-OSS: transposed stacks, biases, interleaved gate and up, the clamped SwiGLU."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K


class GptOssExperts5(nn.Module):
    """gate_up_proj [E, D, 2F], down_proj [E, F, D], both with biases; hit loop of transformers 5.x."""

    def __init__(self):
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * FF))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * FF))
        self.down_proj = nn.Parameter(torch.empty(E, FF, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        # Often reached, and no bfloat16 number: values rounded onto a limit would have arbitrary gradients.
        self.alpha, self.limit = 1.702, 1.497

    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def forward(self, hidden_states, router_indices, routing_weights):
        out = torch.zeros_like(hidden_states, dtype=hidden_states.dtype, device=hidden_states.device)
        with torch.no_grad():
            expert_mask = F.one_hot(router_indices, num_classes=self.num_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            state = hidden_states[token_idx]
            gate_up = state @ self.gate_up_proj[expert_idx] + self.gate_up_proj_bias[expert_idx]
            state = self._apply_gate(gate_up) @ self.down_proj[expert_idx] + self.down_proj_bias[expert_idx]
            weighted = state * routing_weights[token_idx, top_k_pos, None]
            out.index_add_(0, token_idx, weighted.to(hidden_states.dtype))
        return out


class GptOssExperts457(GptOssExperts5):
    """The training loop of 4.57: routing weights as a dense [T, E] table read at (token, expert)."""

    def forward(self, hidden_states, router_indices, routing_weights):
        dense = torch.zeros(hidden_states.shape[0], E, dtype=routing_weights.dtype, device=hidden_states.device)
        dense = dense.scatter(1, router_indices, routing_weights)
        out = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(router_indices, num_classes=self.num_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit[:]:
            expert_idx = expert_idx[0]
            with torch.no_grad():
                _, token_idx = torch.where(expert_mask[expert_idx])
            gate_up = hidden_states[token_idx] @ self.gate_up_proj[expert_idx] + self.gate_up_proj_bias[expert_idx]
            state = self._apply_gate(gate_up) @ self.down_proj[expert_idx] + self.down_proj_bias[expert_idx]
            out.index_add_(0, token_idx, (state * dense[token_idx, expert_idx, None]).to(hidden_states.dtype))
        return out


class GptOssDense457(GptOssExperts5):
    """The inference path of 4.57: every expert on every token by bmm, weights zero outside the top-k."""

    def forward(self, hidden_states, router_indices, routing_weights):
        dense = torch.zeros(hidden_states.shape[0], E, dtype=routing_weights.dtype, device=hidden_states.device)
        dense = dense.scatter(1, router_indices, routing_weights)
        repeated = hidden_states.repeat(E, 1).view(E, -1, D)
        gate_up = torch.bmm(repeated, self.gate_up_proj) + self.gate_up_proj_bias[..., None, :]
        state = torch.bmm(self._apply_gate(gate_up), self.down_proj) + self.down_proj_bias[..., None, :]
        return (state * dense.transpose(0, 1)[..., None]).sum(dim=0)


class GptOssBlock(nn.Module):
    """The router takes its softmax after the top-k and has a bias."""

    def __init__(self, experts=GptOssExperts5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D))
        self.bias = nn.Parameter(torch.empty(E))
        self.experts = experts()

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, D)
        logits = F.linear(hidden_states, self.weight, self.bias)
        values, ids = torch.topk(logits, K, dim=-1)
        scores = F.softmax(values, dim=1, dtype=values.dtype)
        return self.experts(hidden_states, ids, scores).reshape(shape), scores


CASES = (
    Case("gpt_oss_5", GptOssBlock, activation="clamped_swiglu"),
    Case("gpt_oss_457", lambda: GptOssBlock(GptOssExperts457), activation="clamped_swiglu", must_rewrite=False),
    Case("gpt_oss_457_dense", lambda: GptOssBlock(GptOssDense457), activation="clamped_swiglu"),
)
