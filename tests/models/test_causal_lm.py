"""Whole causal models of transformers with eager experts: one graph, every MoE layer rewritten, equal to eager."""

import pytest
import torch

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.models.configs import MODELS, batch

pytest.importorskip("transformers")

each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def flat(call):
    """The call with its caches, whose classes pytree doesn't know, opened to their tensors."""

    def run(**kwargs):
        out = dict(call(**kwargs))
        cache = out.pop("past_key_values", None)
        layers = [] if cache is None else cache.layers
        return out, [[value for value in vars(layer).values() if isinstance(value, torch.Tensor)] for layer in layers]

    return run


def check(model, *, train, device="cpu", **call):
    eager, module = model.make().to(device).train(train), model.make().to(device).train(train)
    compiled = compile_ours(module, fullgraph=True)
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    actual = observe(flat(compiled), module, **inputs, **call)
    assert_same(actual, observe(flat(eager), eager, **inputs, **call))
    assert rewritten() == model.moe_layers
    assert len(graphs) == 1


@each_model
def test_training_step(model, device):
    check(model, train=True, device=device, use_cache=False)


@each_model
@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_default_cache(model, train):
    check(model, train=train)


@each_model
@pytest.mark.slow
def test_evaluation(model):
    check(model, train=False, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("model", [m for m in MODELS if m.router_logits], ids=lambda model: model.name)
def test_router_logits_after_one_eager_call(model):
    """The first call with output_router_logits installs hooks: one eager call first, as transformers asks for."""
    eager, module = model.make(), model.make()
    for target in (eager, module):
        target(**batch(), use_cache=False, output_router_logits=True)
    compiled = compile_ours(module)
    call = {**batch(), "use_cache": False, "output_router_logits": True}
    assert_same(observe(flat(compiled), module, **call), observe(flat(eager), eager, **call))
    assert rewritten() == model.moe_layers


@each_model
@pytest.mark.slow
def test_configuration_is_sound(model):
    """Stock torch.compile takes the same model in one graph once its experts are grouped_mm."""
    eager, module = model.make(), model.make("grouped_mm")
    stock = torch.compile(module, backend="counting_aot_eager", fullgraph=True)
    actual, expected = (
        observe(stock, module, **batch(), use_cache=False),
        observe(eager, eager, **batch(), use_cache=False),
    )
    actual.state = expected.state
    assert_same(actual, expected)
    assert len(graphs) == 1
