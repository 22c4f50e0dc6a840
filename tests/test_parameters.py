"""Experts and routers are found in models of this package and of transformers; everything else isn't."""

import pytest
from torch import nn

import scatter_moe
from scatter_moe.routers import CapacityRouter, TopKRouter
from tests.models.configs import MODELS, Model


def names(model: nn.Module, parameters) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    assert wanted
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


class Experts(nn.ModuleList):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 8)) for _ in range(4))


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(dropout)
        self.router, self.experts = nn.Linear(8, 4, bias=False), Experts(dropout)
        self.shared_experts = nn.Linear(8, 8)
        self.gate_proj = nn.Linear(8, 8)


def test_a_naive_block():
    block = Block()
    assert names(block, scatter_moe.router_parameters(block)) == {"router.weight"}
    experts = names(block, scatter_moe.expert_parameters(block))
    assert experts == {f"experts.{name}" for name, _ in block.experts.named_parameters()}


def test_layers_of_this_package():
    moe = scatter_moe.MoE(CapacityRouter(TopKRouter(8, 4, 2)), scatter_moe.ExpertMLP(4, 8, 16), nn.Linear(8, 8))
    assert names(moe, scatter_moe.router_parameters(moe)) == {"router.router.weight"}
    assert names(moe, scatter_moe.expert_parameters(moe)) == {f"experts.{n}" for n, _ in moe.experts.named_parameters()}
    router = TopKRouter(8, 4, 2)
    assert list(scatter_moe.router_parameters(router)) == [router.weight]


def test_each_parameter_comes_once():
    block = Block()
    model = nn.ModuleList([block, block])
    for find in (scatter_moe.expert_parameters, scatter_moe.router_parameters):
        found = [id(parameter) for parameter in find(model)]
        assert len(found) == len(set(found))


JETMOE = Model("JetMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "intermediate_size": 48})


@pytest.mark.parametrize("model", [*MODELS, JETMOE], ids=lambda model: model.name)
def test_causal_lms_of_transformers(model):
    causal_lm = model.make()
    sizes = {name: parameter.shape for name, parameter in causal_lm.named_parameters()}
    # In these models every 3-D parameter is a stack of experts', and so is whatever is 2-D beside it (biases).
    stacks = {name.rpartition(".")[0] for name, shape in sizes.items() if len(shape) == 3 and "conv1d" not in name}
    expected = {name for name in sizes if name.rpartition(".")[0] in stacks}
    expected |= {name for name in sizes if name.endswith("self_attention.experts.bias")}  # of JetMoE's attention
    assert names(causal_lm, scatter_moe.expert_parameters(causal_lm)) == expected
    routers = {name for name in sizes if {"gate", "router"} & set(name.split("."))}
    assert names(causal_lm, scatter_moe.router_parameters(causal_lm)) == routers


def test_dropout_of_experts_is_set_apart_from_the_rest():
    block = Block(0.1)
    scatter_moe.set_dropout(block, expert=0.4)
    assert block.drop.p == 0.1
    assert {expert[1].p for expert in block.experts} == {0.4}
    scatter_moe.set_dropout(block, dense=0.2)
    assert block.drop.p == 0.2
    assert {expert[1].p for expert in block.experts} == {0.4}


def test_wrong_rates_are_named():
    with pytest.raises(ValueError, match=r"expert: got 1\.5"):
        scatter_moe.set_dropout(Block(), expert=1.5)
    with pytest.raises(ValueError, match=r"no expert of Linear holds an nn\.Dropout"):
        scatter_moe.set_dropout(nn.Linear(2, 2), expert=0.5)
