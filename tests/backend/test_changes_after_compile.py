"""Whatever the user changes after compiling, the next call does what eager does: it recompiles or falls back."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.near_misses.experts import ScaledExpert, Twice
from tests.zoo import hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop, with_dropout
from tests.zoo.case import Case
from tests.zoo.common import D, SwiGLU
from tests.zoo.stacked import StackedBlock, StackedExperts


def block_of(kind):
    return {"range": RangeLoop, "hit": HitLoop, "stacked": StackedBlock}[kind]


class DoubledRange(RangeLoop):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class DoubledHit(HitLoop):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class DoubledStacked(StackedBlock):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def set_top_k(module):
    (module if hasattr(module, "top_k") else module.gate).top_k = 1


def swap_class(module):
    module.__class__ = {RangeLoop: DoubledRange, HitLoop: DoubledHit, StackedBlock: DoubledStacked}[type(module)]


def instance_forward(module):
    original = type(module).forward
    module.forward = lambda hidden_states: 3 * original(module, hidden_states)


def replace_class_forward_of_activation(module):
    owner = module.experts if isinstance(module.experts, StackedExperts) else module.experts[1]
    owner.act_fn = nn.GELU()


def forward_hook(module):
    module.register_forward_hook(lambda _module, _args, out: out * 2)


def expert_hook(module):
    expert = module.experts if isinstance(module.experts, StackedExperts) else module.experts[1]
    expert.register_forward_hook(lambda _module, _args, out: out * 2)


def gate_parametrization(module):
    parametrize.register_parametrization(module.gate, "weight", Twice())


def expert_parametrization(module):
    owner, name = (
        (module.experts, "down_proj")
        if isinstance(module.experts, StackedExperts)
        else (module.experts[1].w1, "weight")
    )
    parametrize.register_parametrization(owner, name, Twice())


def freeze_expert(module):
    expert = module.experts if isinstance(module.experts, StackedExperts) else module.experts[1]
    expert.requires_grad_(False)


def freeze_router(module):
    module.gate.requires_grad_(False)


def to_double(module):
    module.double()


def replace_parameter(module):
    generator = torch.Generator().manual_seed(9)
    weight = nn.Parameter(torch.randn(module.gate.weight.shape, generator=generator))
    module.gate.weight = weight


def replace_expert_parameter(module):
    generator = torch.Generator().manual_seed(9)
    if isinstance(module.experts, StackedExperts):
        shape = module.experts.down_proj.shape
        module.experts.down_proj = nn.Parameter(torch.randn(shape, generator=generator) / 4)
    else:
        linear = module.experts[2].w1
        linear.weight = nn.Parameter(torch.randn(linear.weight.shape, generator=generator) / 4)


def write_through_data(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)


def load_by_assignment(module):
    module.load_state_dict({name: tensor * 1.5 for name, tensor in module.state_dict().items()}, assign=True)


def normalize(module):
    (module if hasattr(module, "normalize") else module.gate).normalize = True


def to_eval(module):
    module.eval()


# Changes every kind of block must follow.
CHANGES = (
    set_top_k,
    normalize,
    to_eval,
    swap_class,
    instance_forward,
    replace_class_forward_of_activation,
    forward_hook,
    expert_hook,
    gate_parametrization,
    expert_parametrization,
    freeze_expert,
    freeze_router,
    to_double,
    replace_parameter,
    replace_expert_parameter,
    write_through_data,
    load_by_assignment,
)


def new_expert(module):
    """One more expert and a router that knows of it."""
    generator = torch.Generator().manual_seed(5)
    expert, gate = SwiGLU(), nn.Linear(D, module.num_experts + 1, bias=False)
    with torch.no_grad():
        for parameter in (*expert.parameters(), *gate.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    module.experts.append(expert)
    module.gate = gate
    module.num_experts += 1


def swap_expert_module(module):
    module.experts[1] = nn.Identity()


def tie_experts(module):
    module.experts[1] = module.experts[0]


def delete_hook(module):
    """A hook that comes and goes."""
    handle = module.experts[1].register_forward_hook(lambda _module, _args, out: out * 2)
    handle.remove()


def swap_expert_class(module):
    module.experts[1].__class__ = ScaledExpert
    module.experts[1].scale = 3.0


# Changes that only a ModuleList of experts can see.
LIST_CHANGES = (new_expert, swap_expert_module, tie_experts, delete_hook, swap_expert_class)


def check_change(kind, change):
    fresh_dynamo()
    case = Case(kind, partial(block_of(kind), normalize=False))
    assert_followed(change, case.make(), case.make())


def assert_followed(change, eager, module):
    """`module`, compiled, is as `eager` before and after the change."""
    compiled = compile_ours(module)
    x = hidden_states()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    assert rewritten() == 1
    change(eager)
    change(module)
    for seed in range(2):
        x = hidden_states(seed=seed, dtype=next(module.parameters()).dtype)
        assert_same(observe(compiled, module, x), observe(eager, eager, x))


@pytest.mark.parametrize("kind", [pytest.param("range", marks=pytest.mark.slow), "stacked"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_is_followed(kind, change):
    check_change(kind, change)


@pytest.mark.parametrize("change", LIST_CHANGES, ids=lambda change: change.__name__)
def test_change_of_expert_list_is_followed(change):
    check_change("range", change)


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES, *LIST_CHANGES], ids=lambda change: change.__name__)
def test_change_of_hit_loop_is_followed(change):
    check_change("hit", change)


@pytest.mark.parametrize("kind", ["range", "hit"])
def test_train_after_eval_draws_dropout_again(kind):
    """A body with dropout is a MoE loop in eval() alone."""
    fresh_dynamo()
    case = Case(kind, lambda: block_of(kind)(with_dropout), train=False)
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    x = hidden_states()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    assert rewritten() == 1
    eager.train()
    module.train()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    eager.eval()
    module.eval()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    assert rewritten() == 1


@pytest.mark.parametrize("kind", ["range", "stacked"])
def test_global_state_is_followed(kind):
    """no_grad, autocast and the default dtype of the surroundings."""
    fresh_dynamo()
    case = Case(kind, block_of(kind))
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    x = hidden_states()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    with torch.no_grad():
        assert_same(observe(compiled, module, x, backward=False), observe(eager, eager, x, backward=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, naive = compiled(x), eager(x)
    assert ours.dtype == naive.dtype
    assert (ours - naive).abs().max() <= 0.05 * naive.abs().max()


def test_monkeypatched_function_is_followed(monkeypatch):
    """A function that the loop calls is replaced after compiling."""
    fresh_dynamo()
    case = Case("range", lambda: StackedBlock())
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    x = hidden_states()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda *args, **kwargs: 2 * original(*args, **kwargs))
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
