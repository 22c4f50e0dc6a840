"""Experts whose parameters were moved into one buffer a name: one input of the graph, and eager in all else."""

import copy
import gc
import io
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import scatter_moe
from fx_passes import expert_stacks
from tests.backend import test_changes_after_compile as changes
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.zoo import hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case
from tests.zoo.common import D, E, SwiGLU

NAMES = ("w1", "w2", "w3")


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList((RangeLoop(), RangeLoop()))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


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


def pair(block=RangeLoop):
    """Equal modules: one for eager, one that is stacked."""
    case = Case("stacked", block)
    return case.make(), scatter_moe.stack_experts(case.make())


def inputs_for_experts(graph):
    return [node for node in graph.graph.find_nodes(op="placeholder") if "expert" in node.name]


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


@pytest.mark.slow
@pytest.mark.parametrize("change", [*changes.CHANGES, *changes.LIST_CHANGES], ids=lambda change: change.__name__)
def test_change_is_followed(change):
    changes.assert_followed(change, *pair(partial(RangeLoop, normalize=False)))


def move_one(module):
    weight = module.experts[2].w2.weight
    weight.data = 2 * weight.data


def swap_two(module):
    first, second = (module.experts[e].w2 for e in (1, 3))
    first.weight, second.weight = second.weight, first.weight


def narrower(module):
    for expert in module.experts:
        expert.w1.weight.data, expert.w3.weight.data = expert.w1.weight.data[:2], expert.w3.weight.data[:2]
        expert.w2.weight.data = expert.w2.weight.data[:, :2]


class Listed(SwiGLU):
    """With containers that are no dicts: a list, and the names of buffers that are not saved."""

    def __init__(self):
        super().__init__()
        self.factors = [1.0, 2.0]
        self.register_buffer("shift", torch.zeros(D), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.factors[1] + self.shift


def write_to_a_list(module):
    module.experts[2].factors[1] = 3.0


def append_to_a_list(module):
    module.experts[2].factors.append(3.0)


@pytest.mark.parametrize("recursive", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "change",
    [
        move_one,
        swap_two,
        narrower,
        write_to_a_list,
        append_to_a_list,
        changes.freeze_expert,
        changes.expert_hook,
        changes.swap_expert_class,
    ],
)
def test_what_takes_experts_apart_is_noticed(change, recursive, monkeypatch):
    """With Dynamo's shortcut for modules whose dicts are unchanged, too."""
    eager, module = pair(partial(RangeLoop, Listed))
    compiled = compile_ours(module, "eager")
    x = hidden_states(requires_grad=False)
    warnings = []
    monkeypatch.setattr(expert_stacks.log, "warning", lambda *args: warnings.append(args))
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=recursive):
        for _ in range(3):  # the shortcut is taken from the second call on
            torch.testing.assert_close(compiled(x), eager(x), rtol=2e-5, atol=2e-5)
        change(eager)
        change(module)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), eager(x), rtol=2e-5, atol=2e-5)
    assert len(warnings) == 1
    assert expert_stacks.stack_of(module.experts) is None


def test_stacked_anew_after_a_move():
    eager, module = pair()
    compiled = compile_ours(module)
    for dtype in (torch.float32, torch.float64):
        scatter_moe.stack_experts(module.to(dtype).experts)
        x = hidden_states(dtype=dtype)
        assert_same(observe(compiled, module, x), observe(eager.to(dtype), eager, x))
        assert len(inputs_for_experts(graphs[-1])) == len(NAMES)


def test_what_is_done_for_a_while_is_undone():
    """functional_call puts other tensors in the place of parameters."""
    eager, module = pair()
    compiled = compile_ours(module)
    x = hidden_states()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    others = {name: 2 * parameter.detach() for name, parameter in module.named_parameters()}
    ours, expected = (torch.func.functional_call(model, others, (x,)) for model in (compiled, eager))
    torch.testing.assert_close(ours, expected)
    count = len(graphs)
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    assert len(graphs) == count


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


@pytest.mark.parametrize("trained", [True, False])
def test_write_before_backward_is_noticed(trained):
    """A frozen expert's weight is needed for the gradient of its input."""
    _, module = pair()
    module.requires_grad_(trained)
    x = hidden_states()
    out = compile_ours(module)(x)
    with torch.no_grad():
        module.experts[1].w1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), x)
    assert len(inputs_for_experts(graphs[0])) == len(NAMES)


def test_module_and_parameters_stay_what_they_are():
    eager, module = Case("range", RangeLoop).make(), Case("range", RangeLoop).make()
    observe(module, module, hidden_states())
    before = dict(module.named_parameters())
    grads = {name: parameter.grad.clone() for name, parameter in before.items()}
    assert scatter_moe.stack_experts(module) is module
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert (type(parameter), parameter.is_leaf, parameter._is_view()) == (nn.Parameter, True, False)
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=0)
        torch.testing.assert_close(parameter, eager.get_parameter(name), rtol=0, atol=0)
    assert vars(module.experts).keys() == vars(eager.experts).keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickled(module)], ids=["deepcopy", "pickle"])
def test_a_copy_is_not_stacked(copied):
    eager, module = pair()
    twin = copied(module)
    module.experts[0].w1.weight.data.zero_()
    assert_same(observe(compile_ours(twin), twin, hidden_states()), observe(eager, eager, hidden_states()))
    assert len(inputs_for_experts(graphs[0])) == E * len(NAMES)


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_state_dict_round_trip():
    eager, module = pair()
    compiled = compile_ours(module)
    compiled(hidden_states())
    other = Case("range", RangeLoop).make(seed=1)
    eager.load_state_dict(other.state_dict())
    module.load_state_dict(pickled(other.state_dict()))
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    torch.testing.assert_close(pickled(module.state_dict()), eager.state_dict(), rtol=0, atol=0)
    assert len(graphs) == 1


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


def test_a_stack_lives_as_long_as_its_list():
    _, module = pair()
    compile_ours(module)(hidden_states()).sum().backward()
    seen = [weakref.ref(thing) for thing in (module.experts, module.experts[0], module.experts[0].w1.weight)]
    del module
    fresh_dynamo()
    gc.collect()
    assert [reference() for reference in seen] == [None, None, None]


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
