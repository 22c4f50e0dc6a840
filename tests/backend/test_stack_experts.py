"""Experts whose parameters were moved into one buffer a name: one input of the graph, and eager in all else."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn

import scatter_moe
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.backend.stacked import NAMES, Two, inputs_for_experts, pair
from tests.zoo import hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.common import D, E, SwiGLU


class Twice(RangeLoop):
    """The same experts in two loops."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + super().forward(hidden_states.flip(1))


class Regularized(RangeLoop):
    """Parameters are read one by one, too."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + sum(expert.w1.weight.square().sum() for expert in self.experts)


class Written(RangeLoop):
    """A parameter is written before the loop."""

    def forward(self, hidden_states):
        with torch.no_grad():
            self.experts[1].w2.weight.mul_(0.5)
        return super().forward(hidden_states)


class Biased(nn.Module):
    """An expert with biases and a buffer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("scale", torch.rand(D))

    def forward(self, x):
        return self.down(self.up(x).relu()) * self.scale


@pytest.fixture(autouse=True)
def _fresh():
    fresh_dynamo()


@pytest.mark.parametrize("block", [RangeLoop, HitLoop])
def test_a_graph_has_one_input_a_name(block):
    eager, module = pair(block)
    compiled = compile_ours(module, fullgraph=True)
    for seed, tokens in enumerate((24, 32, 40)):
        x, twin = hidden_states(tokens, seed), hidden_states(tokens, seed)
        torch._dynamo.mark_dynamic(x, 1)
        module.train(tokens != 32)
        eager.train(tokens != 32)
        assert_same(observe(compiled, module, x, seed=seed), observe(eager, eager, twin, seed=seed))
    assert (rewritten(), len(graphs)) == (1, 1)
    assert len(inputs_for_experts(graphs[0])) == len(NAMES)


@pytest.mark.parametrize(
    "block",
    [Twice, Regularized, Written, partial(RangeLoop, Biased)],
    ids=["twice", "regularized", "written", "biases and buffers"],
)
def test_what_else_a_forward_does(block):
    eager, module = pair(block)
    compiled = compile_ours(module)
    for seed in range(2):
        x, twin = hidden_states(seed=seed), hidden_states(seed=seed)
        assert_same(observe(compiled, module, x, seed=seed), observe(eager, eager, twin, seed=seed))
    assert rewritten() >= 1


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_is_eager_training(inner):
    """Several steps of a fused optimizer with weight decay in groups, clipping, and gradients that accumulate."""
    eager, module = pair(Two)
    losses = []
    for model, call in ((eager, eager), (module, compile_ours(module, inner))):
        groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(model.parameters())]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=True)
        for step in range(3):
            for part in range(2):
                loss = call(hidden_states(seed=2 * step + part)).square().mean()
                loss.backward()
            losses.append((loss.item(), nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 1)
    assert rewritten() == 2
    torch.testing.assert_close(torch.tensor(losses[3:]), torch.tensor(losses[:3]), rtol=2e-4, atol=0)


def test_hooks_of_one_parameter_run():
    eager, module = pair()
    seen = {}
    for name, model in (("eager", eager), ("ours", module)):
        weight, log = model.experts[1].w1.weight, seen.setdefault(name, [])
        weight.register_hook(lambda grad: 3 * grad)
        weight.register_post_accumulate_grad_hook(lambda parameter, log=log: log.append(parameter.grad.clone()))
    assert_same(observe(compile_ours(module), module, hidden_states()), observe(eager, eager, hidden_states()))
    assert len(seen["ours"]) == 1
    torch.testing.assert_close(seen["ours"], seen["eager"])
    assert len(inputs_for_experts(graphs[0])) == len(NAMES)


def test_gradients_of_some_parameters():
    eager, module = pair()
    results = []
    for model, call in ((eager, eager), (module, compile_ours(module))):
        chosen = [model.experts[0].w2.weight, model.experts[3].w1.weight, model.gate.weight]
        results.append(torch.autograd.grad(call(hidden_states()).square().sum(), chosen))
        assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("inside", [torch.no_grad, torch.enable_grad])
def test_grad_mode_around_the_loop_counts(around, inside):
    """Not the one in which the model is called."""
    eager, module = pair()
    compiled = compile_ours(inside()(module.forward))
    with around():
        ours = observe(compiled, module, hidden_states())
        assert_same(ours, observe(inside()(eager.forward), eager, hidden_states()))
    assert rewritten() == 1


def test_layers_compiled_alone_share_their_code():
    eager, module = pair(Two)
    x = hidden_states()
    for layer, twin in zip(module.layers, eager.layers, strict=True):
        assert_same(observe(compile_ours(layer), layer, x), observe(twin, twin, x))
    assert len(graphs) == 1


@pytest.mark.slow
def test_inference_and_dynamic_shapes():
    eager, module = pair()
    compiled = compile_ours(module, dynamic=True)
    for tokens in (24, 48):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                x = hidden_states(tokens, requires_grad=False)
                torch.testing.assert_close(compiled(x), eager(x), rtol=2e-5, atol=2e-5)
    assert all(len(inputs_for_experts(graph)) == len(NAMES) for graph in graphs)


def different(module):
    module.experts[1] = nn.Linear(D, D)


def tied(module):
    module.experts[1].w1.weight = module.experts[0].w1.weight


def meta(module):
    module.to("meta")


def transposed(module):
    for expert in module.experts:
        expert.w1.weight.data = expert.w1.weight.data.t().contiguous().t()


def hooked(module):
    module.experts[1].w1.weight.register_hook(lambda grad: grad)


def observed(module):
    module.seen = weakref.ref(module.experts[1].w1.weight)


def without_parameters(module):
    module.experts = nn.ModuleList(nn.Identity() for _ in range(E))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (different, "differ in more than the values"),
        (tied, "share some"),
        (meta, "meta device"),
        (transposed, "not contiguous"),
        (hooked, "has hooks"),
        (observed, "weak reference"),
        (without_parameters, "no parameters"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_keeps_experts_from_being_stacked(change, reason):
    module = Two()
    change(module.layers[1])
    with pytest.raises(ValueError, match=rf"layers\.1\.experts: .*{reason}"):
        scatter_moe.stack_experts(module)


def test_a_parameter_in_use():
    module = RangeLoop()
    out = module(hidden_states())
    with pytest.raises(RuntimeError, match="in use, by a graph whose backward has not run"):
        scatter_moe.stack_experts(module)
    out.sum().backward()
    scatter_moe.stack_experts(module)


def test_a_model_without_lists_of_experts():
    with pytest.raises(ValueError, match="model: got SwiGLU without a ModuleList named `experts`"):
        scatter_moe.stack_experts(SwiGLU())
