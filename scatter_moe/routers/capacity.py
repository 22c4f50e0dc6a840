"""Expert capacity: each expert takes its first C slots by priority, the others become sentinels.

T tokens, K experts per token, N = T * K slots, E experts, G groups of S tokens each.
"""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from scatter_moe.routers.router import Router, Routing

PRIORITIES = ("choice", "token", "weight")
Priority = Literal["choice", "token", "weight"]


def expert_capacity(num_tokens: int, num_experts: int, top_k: int = 1, capacity_factor: float = 1.0) -> int:
    """C = ceil(capacity_factor * top_k * num_tokens / num_experts), computed without rounding errors.

    The expert capacity of Switch Transformer (arXiv 2101.03961), for any K.

    Raises:
        ValueError: capacity_factor is not positive.
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor: got {capacity_factor}, accepted are positive numbers")
    numerator, denominator = Fraction(str(capacity_factor)).as_integer_ratio()
    return -(-numerator * top_k * num_tokens // (denominator * num_experts))


def limit_capacity(
    routing: Routing, num_experts: int, capacity: int, *, priority: Priority = "choice", groups: int = 1
) -> Routing:
    """Keeps at most `capacity` slots of each expert; the others become sentinels with weight zero.

    A dropped slot of expert e gets the id E + e: the operators compute nothing for it, losses and statistics still see
    which expert was wanted. Weights of kept slots stay as they are. No wait for the device.

    Args:
        routing: topk_ids [T, K]; sentinels in it stay sentinels and fill nothing.
        num_experts: E.
        capacity: C, slots that an expert takes in each group.
        priority: who comes first.
            "choice": all first choices in order of tokens, then all second choices (GShard, arXiv 2006.16668).
            "token": all choices of the first token, then of the second.
            "weight": as "choice", with the tokens in order of their largest weight (batch prioritized routing of V-MoE,
            arXiv 2106.05974).
        groups: G; consecutive groups of T / G tokens (sequences, say) have a capacity each.

    Raises:
        ValueError: priority is none of these; groups does not divide T.
    """
    if priority not in PRIORITIES:
        raise ValueError(f"priority: got {priority!r}, accepted are {', '.join(map(repr, PRIORITIES))}")
    ids_TK = routing.topk_ids
    num_tokens, top_k = ids_TK.shape
    if num_tokens % groups:
        raise ValueError(f"groups: got {groups}, accepted are divisors of the number of tokens, {num_tokens}")
    ids_GSK, weights_GSK = (
        tensor.reshape(groups, num_tokens // groups, top_k) for tensor in (ids_TK, routing.topk_weights.detach())
    )
    rank_TK = _ranks(ids_GSK, weights_GSK, num_experts, priority).reshape(num_tokens, top_k)
    in_use_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    kept_TK = in_use_TK & (rank_TK < capacity)
    dropped_TK = torch.where(in_use_TK, ids_TK + num_experts, ids_TK)
    weights_TK = torch.where(kept_TK, routing.topk_weights, 0.0)
    return Routing(weights_TK, torch.where(kept_TK, ids_TK, dropped_TK), routing.logits)


class CapacityRouter(nn.Module):
    """Any router, with at most ceil(capacity_factor * K * T / E) slots for each expert.

    Args:
        router: decides as without capacity.
        capacity_factor: 1.0 leaves room for a perfectly even load alone (Switch Transformer, arXiv 2101.03961).
        eval_capacity_factor: the one in evaluation; None is the same.
        priority: see `limit_capacity`.

    A call takes x [..., D] and `groups` (see `limit_capacity`) and returns a `Routing`. What a layer gives for a token
    all of whose slots were dropped is zero: the residual connection around the layer carries it on. `pass_overflow`
    makes it x, for a layer without one.

    Raises:
        ValueError: a capacity factor is not positive; priority is none of the accepted ones.
    """

    def __init__(
        self,
        router: Router,
        capacity_factor: float = 1.25,
        *,
        eval_capacity_factor: float | None = None,
        priority: Priority = "choice",
    ) -> None:
        if priority not in PRIORITIES:
            raise ValueError(f"priority: got {priority!r}, accepted are {', '.join(map(repr, PRIORITIES))}")
        super().__init__()
        self.router = router
        self.priority: Priority = priority
        self.num_experts, self.top_k = router.num_experts, router.top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.statistics: nn.Module | None = None
        for factor in (self.capacity_factor, self.eval_capacity_factor):
            expert_capacity(1, 1, 1, factor)

    def forward(self, x: Tensor, groups: int = 1) -> Routing:
        routing = self.router(x)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = expert_capacity(routing.topk_ids.shape[0] // groups, self.num_experts, self.top_k, factor)
        routing = limit_capacity(routing, self.num_experts, capacity, priority=self.priority, groups=groups)
        if self.statistics is not None:
            self.statistics(routing)
        return routing


def pass_overflow(y: Tensor, x: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """y, and x for the tokens that no expert computed.

    Args:
        y: [T, D], what the experts gave: zero for these tokens.
        x: [T, D], what the layer was called with.
        topk_ids: [T, K], with sentinels outside 0..num_experts - 1.
    """
    computed_T1 = ((topk_ids >= 0) & (topk_ids < num_experts)).any(-1, keepdim=True)
    return torch.where(computed_T1, y, x)


def _ranks(ids_GSK: Tensor, weights_GSK: Tensor, num_experts: int, priority: Priority) -> Tensor:
    """[G, S, K]: how many slots of the same expert and group come before each slot."""
    if priority == "token":
        return _ranks_in_order(ids_GSK, num_experts)
    if priority == "choice":
        return _ranks_in_order(ids_GSK.mT, num_experts).mT
    best_first_GS1 = weights_GSK.amax(-1, keepdim=True).argsort(dim=1, descending=True, stable=True)
    best_first_GSK = best_first_GS1.expand_as(ids_GSK)
    ranks_GSK = _ranks_in_order(ids_GSK.gather(1, best_first_GSK).mT, num_experts).mT
    return torch.empty_like(ranks_GSK).scatter(1, best_first_GSK, ranks_GSK)


def _ranks_in_order(ids: Tensor, num_experts: int) -> Tensor:
    """[G, ...]: how many slots of the same expert and group come before each slot, in the order of memory.

    The operators' sort does it, which is stable for one choice a token: a slot's place among the sorted ones, less the
    place of its expert's first. Each group's experts count as experts of their own.
    """
    groups = ids.shape[0]
    in_use = (ids >= 0) & (ids < num_experts)
    group = torch.arange(groups, device=ids.device).view(groups, *[1] * (ids.dim() - 1))
    expert_N1 = torch.where(in_use, ids + group * num_experts, groups * num_experts).reshape(-1, 1)
    order_N, ends = torch.ops.scatter_moe.route(expert_N1, groups * num_experts)
    starts = torch.cat([ends.new_zeros(1), ends])  # a last one for sentinels
    order_N = order_N.long()
    place_N = torch.arange(order_N.numel(), device=ids.device)
    rank_N = torch.empty_like(place_N).scatter(0, order_N, place_N - starts[expert_N1[order_N, 0]])
    return rank_N.view(ids.shape)
