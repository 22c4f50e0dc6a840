"""Ways in which people compile a model, or a part of it: each is rewritten, and equal to eager.

Functions, closures and `model.compile()` are in test_leaks.py, `prepare` in test_prepare.py.
"""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import scatter_moe
from tests.backend.harness import assert_close, assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.zoo import hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case
from tests.zoo.common import D, unit_scale_
from tests.zoo.stacked import StackedBlock

LAYERS = 3

each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("range", RangeLoop), marks=pytest.mark.slow),
        Case("hit", HitLoop),
        Case("stacked", StackedBlock),
    ],
    ids=lambda case: case.name,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def first(out):
    return out[0] if isinstance(out, tuple) else out


class Layer(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(D), block()

    def forward(self, x):
        return x + first(self.block(self.norm(x)))


class Model(nn.Module):
    """Three layers; `run` stands between the model and each of them."""

    def __init__(self, block, run=lambda layer, x: layer(x)):
        super().__init__()
        self.layers = nn.ModuleList([Layer(block) for _ in range(LAYERS)])
        self.run = run

    def forward(self, x):
        for layer in self.layers:
            x = self.run(layer, x)
        return x


def assert_same_results(ours, eager):
    """Compiling a module in place leaves PyTorch's own mark on it: Python state is not compared."""
    ours.state = eager.state
    assert_same(ours, eager)


def model_of(case, **kwargs):
    torch.manual_seed(0)
    return unit_scale_(Model(case.block, **kwargs))


@each_case
def test_submodule_compiled_alone(case):
    eager, module = model_of(case), model_of(case)
    module.layers[1].block.compile(backend="scatter_moe", options={"inner_backend": "counting_aot_eager"})
    assert_same_results(observe(module, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1
    assert len(graphs) == 1


@each_case
def test_each_layer_compiled(case):
    """Regional compile: layers of one class share their code, so one graph serves all of them."""
    eager, module = model_of(case), model_of(case)
    for layer in module.layers:
        layer.compile(backend="scatter_moe", options={"inner_backend": "counting_aot_eager"}, fullgraph=True)
    assert_same_results(observe(module, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == len(graphs) <= LAYERS


@each_case
def test_decorated_forward(case):
    class Decorated(case.block):
        forward = compile_ours(case.block.forward)

    eager, module = case.make(), Case("decorated", Decorated).make()
    assert_same_results(observe(module, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1


@each_case
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(case, use_reentrant):
    run = functools.partial(checkpoint, use_reentrant=use_reentrant)
    eager, module = model_of(case, run=run), model_of(case, run=run)
    compiled = compile_ours(module)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == LAYERS
    assert len(graphs) == 1


@each_case
def test_checkpointed_around_the_compiled_layer(case):
    eager, module = (model_of(case, run=functools.partial(checkpoint, use_reentrant=False)) for _ in range(2))
    for layer in module.layers:
        layer.compile(backend="scatter_moe", options={"inner_backend": "counting_aot_eager"})
    assert_same_results(observe(module, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() >= 1


@each_case
def test_inference_mode(case):
    eager, module = model_of(case).eval(), model_of(case).eval()
    compiled = compile_ours(module, fullgraph=True)
    with torch.inference_mode():
        x = hidden_states(requires_grad=False)
        assert_close(compiled(x), eager(x), "output")
    assert rewritten() == LAYERS


@each_case
def test_autocast_around_the_model(case):
    """No further from float32 than eager under the same autocast."""
    eager, module = case.make(), case.make()
    compiled = compile_ours(module, fullgraph=True)
    x = hidden_states()
    exact = first(eager(x)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = first(compiled(x)), first(eager(x))
    assert rewritten() == 1
    assert ours.dtype == theirs.dtype
    assert (ours - exact).square().mean() <= 1.05**2 * (theirs - exact).square().mean()


@each_case
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_prepared_model(case, strict):
    module = scatter_moe.prepare(model_of(case))
    x = hidden_states(requires_grad=False)
    program = torch.export.export(module, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(target.startswith("scatter_moe.mlp") for target in targets) == LAYERS
    assert_close(program.module()(x), module(x), "output")
    assert not any("nonzero" in target for target in targets)


def test_generation_with_a_static_cache():
    """One graph for the prompt and one for every token after it."""
    pytest.importorskip("transformers")
    from tests.models.configs import MODELS, batch

    model = next(model for model in MODELS if model.name == "Mixtral")
    eager, module = model.make().eval(), model.make().eval()
    module.forward = compile_ours(module.forward)
    ids = batch(length=6)["input_ids"]
    options = {"cache_implementation": "static", "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(module.generate(ids, **options), eager.generate(ids, **options))
    assert rewritten() == len(graphs) * model.moe_layers == 2 * model.moe_layers
