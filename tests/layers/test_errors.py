"""Wrong arguments of the layers raise errors that name them."""

import pytest
import torch
from torch import nn

from scatter_moe import (
    Dispatch,
    ExpertMLP,
    MixtureOfAttention,
    MoE,
    ParallelLinear,
    explain,
    from_modules,
    prepare,
    stack_experts,
)
from scatter_moe.routers import CapacityRouter, TopKRouter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "activation: got 'swish'"),
        ({"layout": "stacked"}, "layout: got 'stacked'"),
        ({"weight_on": "both"}, "weight_on: got 'both'"),
        ({"layout": "plain", "activation": "clamped_swiglu"}, "layout: got 'plain' with activation 'clamped_swiglu'"),
    ],
)
def test_expert_mlp_options(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertMLP(4, 8, 8, **options)


def test_expert_mlp_inputs():
    layer, ids, weights = ExpertMLP(4, 8, 8), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
    with pytest.raises(ValueError, match="x: got 9 columns, accepted is 8"):
        layer(torch.ones(3, 9), ids, weights)
    with pytest.raises(TypeError, match=r"gate_up: got torch.float32, accepted is x's dtype torch.float16"):
        layer(torch.ones(3, 8, dtype=torch.half), ids, weights)
    with pytest.raises(TypeError, match=r"topk_ids: got torch.float32"):
        layer(torch.ones(3, 8), weights, weights)
    with pytest.raises(ValueError, match=r"num_tokens_per_expert: got shape \(5,\), accepted is \(4,\)"):
        layer.forward_grouped(torch.ones(3, 8), torch.ones(5, dtype=torch.long))
    with pytest.raises(TypeError, match="num_tokens_per_expert: got list, accepted is a tensor"):
        layer.forward_grouped(torch.ones(3, 8), [3, 0, 0, 0])


@pytest.mark.parametrize("counts", [[2, 1, 0, 1], [4, 0, 0, 0]])
def test_more_grouped_rows_than_there_are(counts):
    layer, x, counts = ExpertMLP(4, 8, 8), torch.ones(3, 8), torch.tensor(counts)
    with pytest.raises(ValueError, match="offsets: got rows up to 4 for the experts, accepted are up to 3"):
        layer.forward_grouped(x, counts)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[2, 1, 0, 1], [4, 0, 0, 0], [2**30, 0, 0, 1]])
def test_more_grouped_rows_than_there_are_give_nan_on_a_gpu(counts):
    layer = ExpertMLP(4, 8, 8, device="cuda")
    y = layer.forward_grouped(torch.ones(3, 8, device="cuda"), torch.tensor(counts, device="cuda"))
    assert y.isnan().all()


@pytest.mark.parametrize("layer", [ExpertMLP, ParallelLinear])
def test_no_experts(layer):
    with pytest.raises(ValueError, match="num_experts: got 0, accepted is at least 1"):
        layer(0, 8, 8)


@pytest.mark.parametrize("layer", [ExpertMLP, ParallelLinear, TopKRouter])
def test_sizes(layer):
    with pytest.raises(ValueError, match="got -3, accepted is at least 1"):
        layer(4, -3, 8)
    with pytest.raises(TypeError, match=r"got 8\.0, accepted are whole numbers"):
        layer(4, 8, 8.0)


def test_a_router_that_returns_something_else():
    x = torch.ones(1, 3, 8)
    for layer in (MoE(nn.Linear(8, 4), ExpertMLP(4, 8, 8)), MixtureOfAttention(nn.Linear(8, 4), 8, 4, 2, 4)):
        with pytest.raises(TypeError, match="router: got one that returns Tensor, accepted is one that returns a"):
            layer(x)


@pytest.mark.parametrize("function", [explain, prepare, stack_experts])
def test_what_is_no_model(function):
    with pytest.raises(TypeError, match="model: got int, accepted is a"):
        function(3)


def test_what_holds_no_experts():
    with pytest.raises(TypeError, match="experts: got Linear, accepted is a ModuleList"):
        from_modules(nn.Linear(4, 4))


@pytest.mark.parametrize("router", [TopKRouter(8, 5, 2), CapacityRouter(TopKRouter(8, 5, 2))])
def test_router_of_another_number_of_experts(router):
    for make in (lambda: MoE(router, ExpertMLP(4, 8, 8)), lambda: MixtureOfAttention(router, 8, 4, 2, 4)):
        with pytest.raises(ValueError, match="router: got one of 5 experts, accepted is one of 4"):
            make()


def test_parallel_linear_inputs():
    layer = ParallelLinear(4, 8, 8)
    dispatch = Dispatch.of_ids(torch.zeros(3, 2, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="rows_in: got 'scattered', accepted are 'tokens', 'slots' and 'grouped'"):
        layer(torch.ones(3, 8), dispatch, rows_in="scattered")
    with pytest.raises(ValueError, match="rows_out: got 'tokens', accepted are 'slots' and 'grouped'"):
        layer(torch.ones(3, 8), dispatch, rows_out="tokens")
    with pytest.raises(ValueError, match="x: got 3 rows, accepted is 6"):
        layer(torch.ones(3, 8), dispatch, rows_in="slots")
    with pytest.raises(TypeError, match="dispatch: got Tensor, accepted is what Dispatch"):
        layer(torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.long))


def test_initialised_as_a_stack_of_linear_layers():
    torch.manual_seed(0)
    layer, linear = ParallelLinear(64, 16, 32), torch.nn.Linear(16, 32)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.shape == (64, *theirs.shape)
        bound = 16**-0.5
        assert ours.abs().max() <= bound
        assert ours.std().item() == pytest.approx(2 * bound / 12**0.5, rel=0.05)
