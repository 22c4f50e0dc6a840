"""What every router is: a module that is called with x and returns a `Routing`.

T tokens (all leading dimensions of x), K experts per token, E experts, D model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatter_moe.arguments import at_least_one
from scatter_moe.routers.jitter import jitter


class Routing(NamedTuple):
    """Which experts each token goes to.

    Attributes:
        topk_weights: [T, K], float32 (float64 where the logits are), differentiable.
        topk_ids: [T, K], int64. Ids from E up are sentinels: nobody computes that slot, and its weight is zero. E + e
            is a slot that wanted expert e and was dropped.
        logits: [T, E], float32 (float64), differentiable: what losses read.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    logits: Tensor


class Router(nn.Module):
    """The base class: logits are linear in x; `select`, which a subclass defines, turns them into choices.

    Args:
        d_model: D, the width of x.
        num_experts: E.
        top_k: K, experts per token, 1..E.
        bias: adds a bias to the logits (as GPT-OSS does).
        jitter: in training x is multiplied by uniform noise within 1 - jitter and 1 + jitter, for the
            router alone (Switch Transformer, arXiv 2101.03961).
        logits_dtype: the dtype that logits are computed in. None: that of the weight, so that a router whose parameters
            are float32 in a bfloat16 model computes in float32 (selective precision in that paper).
        device, dtype: of the parameters.

    Parameters: `weight` [E, D] and `bias` [E] or None. `statistics` is None or a module that is called with each
    `Routing`.

    Raises:
        TypeError, ValueError: a size that isn't a whole number of at least 1; top_k or jitter out of range; x of
            another width than d_model.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        jitter: float = 0.0,
        logits_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least_one(d_model=d_model, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k: got {top_k}, accepted are 1..{num_experts} (num_experts)")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: got {jitter}, accepted are numbers from 0 to below 1")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.jitter, self.logits_dtype = jitter, logits_dtype
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.statistics: nn.Module | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation D ** -0.5 (unit-scale x gives unit-scale logits), zero bias."""
        nn.init.normal_(self.weight, std=self.d_model**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Routing:
        """x: [..., D], any float dtype; its leading dimensions become T in the result."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x: got width {x.shape[-1]}, accepted is d_model = {self.d_model}")
        x_TD = x.reshape(-1, self.d_model)
        if self.training and self.jitter:
            x_TD = jitter(x_TD, self.jitter)
        logits_TE = self.score(x_TD)
        routing = Routing(*self.select(logits_TE), logits_TE)
        if self.statistics is not None:
            self.statistics(routing)
        return routing

    def score(self, x_TD: Tensor) -> Tensor:
        """Logits [T, E], at least float32, from x [T, D]."""
        dtype = self.logits_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return at_least_float32(F.linear(x_TD.to(dtype), self.weight.to(dtype), bias))

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """topk_weights [T, K] and topk_ids [T, K] from logits [T, E]."""
        raise NotImplementedError(f"{type(self).__name__} does not define select(logits)")

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


def at_least_float32(x: Tensor) -> Tensor:
    """Softmax and top-k of bfloat16 logits tie too often: scores are kept in float32, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
