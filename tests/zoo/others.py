"""Granite (sorted segments), Phi-MoE (sparsemixer) and Jamba (unnormalised, module list of one or many)."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, E, K, SwiGLU
from tests.zoo.qwen import GatedMLP
from tests.zoo.stacked import StackedExperts


class ParallelExperts(nn.Module):
    """Granite's and JetMoE's per-expert linear over segments of sorted rows."""

    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.num_experts = num_experts

    def forward(self, inputs, expert_size):
        parts = inputs.split(expert_size, dim=0)
        return torch.cat([F.linear(parts[i], self.weight[i]) for i in range(self.num_experts)], dim=0)


class GraniteMoe(nn.Module):
    """Sort the slots, split by counts, two ParallelExperts, index_add back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, E, bias=False)
        self.input_linear = ParallelExperts(E, D, 2 * FF)
        self.output_linear = ParallelExperts(E, FF, D)

    def route(self, hidden_states):
        logits = self.layer(hidden_states).float()
        top_logits, ids = logits.topk(K, dim=1)
        gates = torch.softmax(top_logits, dim=1).type_as(hidden_states)
        counts = torch.zeros([top_logits.size(0), E], dtype=gates.dtype, device=gates.device).scatter(1, ids, 1)
        expert_size = counts.long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        batch_index = order.div(K, rounding_mode="trunc")
        return batch_index, gates.flatten()[order], expert_size

    def forward(self, layer_input):
        batch, length, width = layer_input.size()
        layer_input = layer_input.reshape(-1, width)
        batch_index, batch_gates, expert_size = self.route(layer_input)
        hidden = self.input_linear(layer_input[batch_index], expert_size)
        gate, up = hidden.chunk(2, dim=-1)
        outputs = self.output_linear(F.silu(gate) * up, expert_size) * batch_gates[:, None]
        zeros = torch.zeros((batch * length, width), dtype=outputs.dtype, device=outputs.device)
        return zeros.index_add(0, batch_index, outputs).view(batch, length, width)


class GraniteStacked(nn.Module):
    """The 5.x block: softmax over the chosen logits, stacked experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.experts = StackedExperts()

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, D)
        top_logits, ids = self.router(hidden_states).float().topk(K, dim=-1)
        weights = torch.softmax(top_logits, dim=-1).type_as(hidden_states)
        return self.experts(hidden_states, ids, weights).view(shape)


class MixerMultiplier(torch.autograd.Function):
    """The gradient estimate of sparse backpropagation (arXiv 2409.12136); it belongs to the router."""

    @staticmethod
    def forward(ctx, scores, multiplier, selected, gates, mask_for_one):
        ctx.save_for_backward(multiplier, selected, gates)
        return multiplier * mask_for_one

    @staticmethod
    def backward(ctx, grad):
        multiplier, selected, gates = ctx.saved_tensors
        grad = grad * multiplier
        return (gates * -grad).scatter_add(-1, selected, grad), None, None, None, None


class PhiMoe(Block):
    """Two experts picked one after the other by a noisy argmax; range(E) loop."""

    jitter = 0.01

    def __init__(self):
        super().__init__(expert=SwiGLU)

    def pick(self, scores, visible):
        with torch.no_grad():
            threshold, best = visible.max(dim=-1, keepdim=True)
            factor = scores.abs().clamp(min=threshold)
            far = ((threshold - scores) / factor) > (2 * self.jitter)
        gates = visible.masked_fill(far, float("-inf"))
        if self.training:
            noise = torch.empty_like(gates).exponential_().log()
            selected = (gates - noise).max(dim=-1)[1].unsqueeze(-1)
        else:
            selected = best
        gates = torch.softmax(gates, dim=-1)
        multiplier = gates.gather(dim=-1, index=selected)
        if self.training:
            best_score, best = gates.max(dim=-1, keepdim=True)
            one = torch.logical_or(selected == best, torch.rand_like(best_score) > 0.75)
            one = torch.add(0.3333, one, alpha=0.6667).type_as(gates)
            multiplier = MixerMultiplier.apply(scores, multiplier, selected, gates, one)
        return multiplier, selected

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        scores = self.gate(hidden_states)
        first, first_id = self.pick(scores, scores)
        masked = torch.scatter(scores, -1, first_id, float("-inf"))
        second, second_id = self.pick(scores, masked)
        weights = torch.cat((first, second), dim=-1)
        ids = torch.cat((first_id, second_id), dim=-1)
        out = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            state = hidden_states[None, top_x].reshape(-1, width)
            state = expert_layer(state) * weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out.reshape(batch, length, width), scores


class Jamba(Block):
    """range(E) loop; softmax weights of all experts, not renormalised."""

    def __init__(self):
        super().__init__(expert=GatedMLP, normalize=False)

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
            state = hidden_states[None, top_x].reshape(-1, width)
            state = expert_layer(state) * weights[top_x, idx, None]
            out.index_add_(0, top_x, state.to(hidden_states.dtype))
        return out.reshape(batch, length, width), logits


CASES = (
    Case("granite_45x", GraniteMoe),
    Case("granite_5", GraniteStacked),
    Case("phimoe_445_eval", PhiMoe, train=False),
    Case("phimoe_445_train", PhiMoe, random=True),
    Case("jamba_445", Jamba),
)
