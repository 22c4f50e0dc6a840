"""Experts in one buffer a name: what is changed, copied, saved and dropped is as without the buffer."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import scatter_moe
from fx_passes.modules import expert_stacks
from tests.backend import test_changes_after_compile as changes
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe
from tests.backend.stacked import NAMES, inputs_for_experts, pair, pickled
from tests.zoo import hidden_states
from tests.zoo.bodies import RangeLoop
from tests.zoo.case import Case
from tests.zoo.common import D, E, SwiGLU


@pytest.fixture(autouse=True)
def _fresh():
    fresh_dynamo()


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


@pytest.mark.slow
@pytest.mark.parametrize("change", [*changes.CHANGES, *changes.LIST_CHANGES], ids=lambda change: change.__name__)
def test_change_is_followed(change):
    changes.assert_followed(change, *pair(partial(RangeLoop, normalize=False)))


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


def test_a_stack_lives_as_long_as_its_list():
    _, module = pair()
    compile_ours(module)(hidden_states()).sum().backward()
    seen = [weakref.ref(thing) for thing in (module.experts, module.experts[0], module.experts[0].w1.weight)]
    del module
    fresh_dynamo()
    gc.collect()
    assert [reference() for reference in seen] == [None, None, None]
