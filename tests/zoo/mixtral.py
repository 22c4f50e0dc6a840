"""Mixtral's block as transformers wrote it through the years, with a ModuleList of w1, w2, w3 experts."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import Block, SwiGLU


class Mixtral436(Block):
    """range(E); skips experts without tokens; indexes with Python lists."""

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits, ids, weights = self.route(hidden_states)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            top_x_list = top_x.tolist()
            idx_list = idx.tolist()
            state = hidden_states[None, top_x_list].reshape(-1, width)
            state = expert_layer(state) * weights[top_x_list, idx_list, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out.reshape(batch, length, width), logits


class Mixtral445(Block):
    """range(E) without a guard; the router logits are returned."""

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


class Mixtral451(Block):
    """Only the experts that were hit, found under the loop's own eyes, indexed by a one-element tensor."""

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits, ids, weights = self.route(hidden_states)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            state = hidden_states[None, top_x].reshape(-1, width)
            state = expert_layer(state) * weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out.reshape(batch, length, width), logits


class ExpertList457(nn.ModuleList):
    """The loop lives in the list itself."""

    def __init__(self, num_experts):
        super().__init__([SwiGLU() for _ in range(num_experts)])
        self.num_experts = num_experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            state = hidden_states[None, top_x].reshape(-1, hidden_states.shape[-1])
            state = self[expert_idx](state) * top_k_weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out


class Mixtral457(Block):
    """A router and an expert list that is a module with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.experts = ExpertList457(self.num_experts)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, shape[-1])
        _, ids, weights = self.route(hidden_states)
        return self.experts(hidden_states, ids, weights).reshape(shape)


CASES = (
    Case("mixtral_436", Mixtral436),
    Case("mixtral_445", Mixtral445),
    Case("mixtral_451", Mixtral451),
    Case("mixtral_457", Mixtral457),
)
