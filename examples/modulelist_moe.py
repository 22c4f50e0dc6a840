"""A small decoder whose Mixture-of-Experts layer is written by hand: a Python loop over an ``nn.ModuleList``.

Nothing here knows of scatter_moe.
Shapes: B batch, S sequence, T = B * S tokens, K experts per token, E experts, D model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int, expert_width: int):
        super().__init__()
        self.gate = nn.Linear(width, expert_width, bias=False)
        self.up = nn.Linear(width, expert_width, bias=False)
        self.down = nn.Linear(expert_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Each token goes to its K best experts; one expert after the other takes its tokens."""

    def __init__(self, width: int, expert_width: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, expert_width) for _ in range(num_experts))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        probabilities_TE = self.router(x_TD).softmax(dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = probabilities_TE.topk(self.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids_TK == e)
            out_TD.index_add_(0, token, expert(x_TD[token]) * weights_TK[token, slot, None])
        return out_TD.view_as(x_BSD)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in self.qkv(x_BSD).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, expert_width: int, num_experts: int, top_k: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.moe_norm = nn.RMSNorm(width)
        self.moe = MoE(width, expert_width, num_experts, top_k)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.moe(self.moe_norm(x_BSD))


class ModuleListMoE(nn.Module):
    """Token and position embeddings, blocks, a head; called as the transformers models are: ``(input_ids, labels)``."""

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        layers: int,
        width: int,
        heads: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, expert_width, num_experts, top_k) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x_BSD = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        logits = self.head(self.norm(x_BSD))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Output(loss, logits)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
