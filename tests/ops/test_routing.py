"""Random routings: skew, empty experts, duplicates, sentinels, no tokens, one expert to all experts per token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numerics import assert_exact
from tests.ops import naive
from tests.ops.cases import OPS


@st.composite
def routings(draw) -> tuple[torch.Tensor, int]:
    """topk_ids [T, K] and the number of experts."""
    num_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0]))
    ids = (num_experts * torch.rand(num_tokens, top_k, generator=generator) ** (1 + skew)).long()
    if draw(st.booleans()):  # distinct ids in a row, as topk gives
        popularity = torch.rand(num_tokens, num_experts, generator=generator) ** (1 + skew)
        ids = popularity.topk(top_k).indices
    if draw(st.booleans()):  # sentinels below and above
        sentinel = draw(st.sampled_from([-1, num_experts, num_experts + 7, -(2**31)]))
        ids = torch.where(torch.rand(num_tokens, top_k, generator=generator) < 0.2, sentinel, ids)
    if draw(st.booleans()):
        ids = ids[:, :1].expand(num_tokens, top_k)
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), num_experts


@given(routings())
@settings(max_examples=150, deadline=None)
def test_route_sorts_the_slots(routing):
    """By expert, an expert's slots by choice, and those of a choice by token."""
    topk_ids, num_experts = routing
    order, offsets = OPS.route(topk_ids, num_experts)
    assert order.dtype == offsets.dtype == torch.int32
    top_k, sentinels = topk_ids.shape[1], []
    slots_of = [[] for _ in range(num_experts)]
    for choice, experts in enumerate(topk_ids.t().tolist()):
        for token, expert in enumerate(experts):
            (slots_of[expert] if 0 <= expert < num_experts else sentinels).append(token * top_k + choice)
    assert order.tolist() == [*(slot for slots in slots_of for slot in slots), *sentinels]
    assert offsets.tolist() == torch.tensor([len(slots) for slots in slots_of]).cumsum(0).tolist()


@given(routings(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_parallel_linear_and_combine(routing, grouped_in, grouped_out, as_list):
    topk_ids, num_experts = routing
    num_tokens, top_k = topk_ids.shape
    order, offsets = OPS.route(topk_ids, num_experts)
    x = random(num_tokens * top_k if grouped_in else num_tokens, 6)
    weight, bias = parameter(num_experts, as_list, 5, 6), parameter(num_experts, not as_list, 5)
    topk_weights = random(num_tokens, top_k)

    def block(ops):
        y = ops.parallel_linear(x, weight, order, offsets, top_k, grouped_in, grouped_out, bias)
        return ops.combine(y, topk_weights, order, offsets, top_k, grouped_out)

    assert_same(block, [x, topk_weights, *weight, *bias])


@given(routings(), st.sampled_from(["plain", "concatenated", "separate"]), st.sampled_from(["output", "input"]))
@settings(max_examples=60, deadline=None)
def test_mlp(routing, layout, weight_on):
    topk_ids, num_experts = routing
    num_tokens, top_k = topk_ids.shape
    order, offsets = OPS.route(topk_ids, num_experts)
    x, topk_weights = random(num_tokens, 6), random(num_tokens, top_k)
    width = 8 if layout == "concatenated" else 4
    gate_up, gate_up_bias = parameter(num_experts, True, width, 6), parameter(num_experts, False, width)
    up = parameter(num_experts, False, 4, 6) if layout == "separate" else []
    down, down_bias = parameter(num_experts, False, 6, 4), parameter(num_experts, True, 6)

    def block(ops):
        parameters = (gate_up, up, down, gate_up_bias, [], down_bias)
        return ops.mlp(x, topk_weights, order, offsets, *parameters, "silu", layout, False, weight_on)

    assert_same(block, [x, topk_weights, *gate_up, *up, *down, *gate_up_bias, *down_bias])


def assert_same(block, inputs):
    """Output and gradients of the operators and of the naive loop, in float64."""
    results = []
    for ops in (OPS, naive):
        out = block(ops)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
        results.append({"output": out.detach()} | {f"gradient {i}": grad for i, grad in enumerate(grads)})
    assert_exact(*results, torch.float64)


def parameter(num_experts: int, as_list: bool, *shape: int) -> list[torch.Tensor]:
    return (
        [random(*shape) for _ in range(num_experts)] if as_list and num_experts > 1 else [random(num_experts, *shape)]
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
