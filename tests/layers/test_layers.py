"""Every layer equals its loop over experts: values and gradients, compiled, exported, saved and loaded."""

import copy
import functools
import io

import pytest
import torch

from scatter_moe import ExpertMLP, MoE
from scatter_moe.routers import TopKRouter
from tests.backend.harness import compile_ours, fresh_dynamo, graphs
from tests.layers.cases import CASES, WIDTH, Case, D, E, K, T, mlp_loop, results
from tests.numerics import MIN_SEEDS, Sample, assert_exact, assert_low_precision

each_layer = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def loop_of(case: Case, module: torch.nn.Module):
    return functools.partial(case.naive, module)


@each_layer
def test_equals_the_loop(case: Case, device: str, poisoned_memory):
    module, wide = case.module(device=device), case.module(torch.float64, device)
    actual = results(module, module, case.arguments(device=device))
    assert_exact(actual, results(loop_of(case, wide), wide, case.arguments(torch.float64, device)))


@each_layer
def test_low_precision(case: Case, device: str):
    samples = []
    for seed in range(MIN_SEEDS):
        module = case.module(torch.bfloat16, device, seed)
        wide = copy.deepcopy(module).double()
        arguments = case.arguments(torch.bfloat16, device, seed)
        exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]
        ours, naive = (results(call, module, arguments) for call in (module, loop_of(case, module)))
        samples.append(Sample(ours, naive, results(loop_of(case, wide), wide, exact)))
    assert_low_precision(samples, torch.bfloat16)


@each_layer
@pytest.mark.parametrize("backend", ["aot_eager", "scatter_moe", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(case: Case, backend: str, device: str):
    module = case.module(device=device)
    expected = results(module, module, case.arguments(device=device))
    if backend == "scatter_moe":
        compiled = compile_ours(module, fullgraph=True)
    else:
        compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert_exact(results(compiled, module, case.arguments(device=device)), expected)
    assert backend != "scatter_moe" or len(graphs) == 1


@each_layer
@pytest.mark.parametrize("strict", [False, True])
def test_exports(case: Case, strict: bool, device: str):
    module = case.module(device=device)
    arguments = tuple(argument.detach() for argument in case.arguments(device=device))
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments, strict=strict), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert_exact({"out": loaded(*arguments)}, {"out": module(*arguments)})


@each_layer
def test_state_dict_round_trip(case: Case):
    module, other = case.module(seed=0), case.module(seed=1)
    arguments = case.arguments()
    assert not torch.equal(module(*arguments), other(*arguments))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(*arguments), other(*arguments))


@each_layer
def test_on_the_meta_device(case: Case):
    """Parameters are made where they are asked for, and `reset_parameters` fills them later."""
    with torch.device("meta"):
        module = case.make()
    assert all(parameter.is_meta for parameter in module.parameters())


def test_moe_with_a_learned_router():
    """Also returns what the router decided; `[B, S, D]` is seen as T = B * S tokens."""
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, E, K), ExpertMLP(E, D, WIDTH))
    x = torch.randn(2, T // 2, D)
    out, routing = layer.forward_with_routing(x)
    assert_exact({"out": layer(x)}, {"out": out})
    rows = x.flatten(0, 1)
    expected = mlp_loop(layer.experts, rows, routing.topk_ids, routing.topk_weights)
    assert_exact({"out": out}, {"out": expected.view_as(x)})
    assert torch.equal(routing.logits, layer.router(rows).logits)
