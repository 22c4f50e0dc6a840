"""What every naive block shares: sizes, a router, common experts, unit-scale weights.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

import torch
from torch import nn
from torch.nn import functional as F

BATCH, TOKENS = 2, 24
D, FF, E, K = 16, 24, 4, 2


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), as Mixtral names it."""

    def __init__(self, width=D, hidden=FF):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A softmax top-k router and a ModuleList of experts; subclasses write the loop."""

    def __init__(self, expert=SwiGLU, num_experts=E, top_k=K, normalize=True):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.normalize = normalize
        self.gate = nn.Linear(D, num_experts, bias=False)
        self.experts = nn.ModuleList([expert() for _ in range(num_experts)])

    def route(self, x_TD):
        """Return logits_TE, topk_ids_TK and topk_weights_TK."""
        logits = self.gate(x_TD)
        probs = F.softmax(logits, dim=1, dtype=torch.float)
        weights, ids = torch.topk(probs, self.top_k, dim=-1)
        if self.normalize:
            weights /= weights.sum(dim=-1, keepdim=True)
        return logits, ids, weights.to(x_TD.dtype)


def unit_scale_(module):
    """Redraw all parameters so that unit-scale inputs give outputs of order one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(mean=1.0, std=0.2)
    return module


def hidden_states(tokens=TOKENS, seed=0, dtype=torch.float32, requires_grad=True, device="cpu"):
    """Unit-scale [B, S, D] hidden states with B * S = tokens, the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, tokens // BATCH, D, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(requires_grad)
