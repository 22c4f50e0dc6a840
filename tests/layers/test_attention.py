"""Mixture of attention: decoding with a cache, the order of heads, sentinels, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scatter_moe import KVCache, MixtureOfAttention
from scatter_moe.routers import Routing, TopKRouter
from tests.layers.cases import HEAD_DIM, HEADS, D, E, FixedChoice
from tests.numerics import assert_exact


def layer_and_tokens(**options):
    torch.manual_seed(0)
    return MixtureOfAttention(TopKRouter(D, E, 2), D, E, HEADS, HEAD_DIM, **options).eval(), torch.randn(2, 9, D)


@pytest.mark.parametrize("parts", [[1] * 9, [5, 1, 3], [9]], ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_decoding_with_a_cache(parts, padding):
    """Tokens that come one by one or in parts give what they give at once."""
    layer, x = layer_and_tokens(rope_theta=1e4)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    expected = layer(x, mask if padding else None)
    cache, outs = KVCache(), []
    for part in x.split(parts, dim=1):
        seen = cache.length + part.shape[1]
        outs.append(layer(part, mask[:, :seen] if padding else None, cache))
    assert cache.length == 9
    assert_exact({"out": torch.cat(outs, dim=1)}, {"out": expected})


def test_one_expert_for_all_is_attention():
    """With one expert, chosen by every token with weight one, this is multi-head attention."""

    class Only(nn.Module):
        def forward(self, x):
            ones = x.new_ones(x.shape[0], 1)
            return Routing(ones, torch.zeros_like(ones, dtype=torch.long), ones)

    torch.manual_seed(0)
    layer, x = MixtureOfAttention(Only(), D, 1, HEADS, HEAD_DIM), torch.randn(2, 9, D)
    q, k, v = (
        F.linear(x, weight).view(2, 9, HEADS, HEAD_DIM).transpose(1, 2)
        for weight in (layer.q_proj.weight[0], layer.k_proj.weight, layer.v_proj.weight)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert_exact({"out": layer(x)}, {"out": F.linear(y, layer.o_proj.weight[0])})


def test_slots_without_an_expert_give_nothing():
    class Dropping(FixedChoice):
        def forward(self, x):
            routed = super().forward(x)
            return routed._replace(topk_ids=routed.topk_ids.index_fill(0, torch.tensor([4]), E))

    torch.manual_seed(0)
    layer, x = MixtureOfAttention(Dropping(), D, E, HEADS, HEAD_DIM, bias=True), torch.randn(1, 9, D)
    assert (layer(x)[0, 4] == 0).all()
    assert (layer(x)[0, 5] != 0).all()


def test_a_later_token_changes_nothing_before_it():
    layer, x = layer_and_tokens(rope_theta=1e4)
    other = x.clone()
    other[:, 6:] = torch.randn(2, 3, D)
    assert_exact({"out": layer(other)[:, :6]}, {"out": layer(x)[:, :6]})


def test_frozen_experts_keep_no_rows():
    """Nor does a frozen query projection keep x for its weight."""
    layer, x = layer_and_tokens()
    layer.requires_grad_(False)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not any(tensor.data_ptr() == x.data_ptr() for tensor in kept)


def test_errors():
    with pytest.raises(ValueError, match="head_dim: got 15 with rope_theta, accepted are even numbers"):
        MixtureOfAttention(TopKRouter(D, E, 2), D, E, HEADS, 15, rope_theta=1e4)
    layer, x = layer_and_tokens()
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 8\), accepted is \(2, 9\)"):
        layer(x, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"x: got shape \(9, 64\), accepted is \[B, S, 64\]"):
        layer(x[0])
