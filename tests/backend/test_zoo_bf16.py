"""In bfloat16 a rewritten block is as close to float64 as the naive code is, pooled over seeds, tensor by tensor."""

import copy
import re
from collections import defaultdict

import pytest
import torch

from tests.backend.harness import Seen, compile_ours, fresh_dynamo, observe, rewritten
from tests.backend.replay import FloatMeansDouble, RecordChoices, ReplayChoices
from tests.numerics import MIN_ELEMENTS, MIN_SEEDS, Sample, assert_low_precision
from tests.zoo import ZOO, hidden_states

TOKENS = 48
QUICK = (
    "mixtral_445",
    "deepseek_v3_457",
    "stacked_sentinel",
    "gpt_oss_5",
    "range_gelu_bias",
    "range_lora",
    "gathered_clamped",
)
LIMITS = {"dense_sequences_einsum": {"input 0": 1.08}}  # eager adds up the experts' parts of it before it rounds them
CASES = [case for case in ZOO if case.must_rewrite and case.differentiable and not case.random]


def role_of(name):
    """Parameters of all experts play one role, those of a router or a norm another."""
    if name.startswith(("output", "input")):
        return name
    if "experts." in name:
        return re.sub(r"\.\d+\.", ".*.", name)
    return name.rpartition(".")[0] or "router"


def by_role(seen: Seen, learning):
    """Outputs and gradients, flattened and joined by role; `learning` has the shapes of what gets gradients."""
    named = {f"output {i}": leaf for i, leaf in enumerate(seen.outputs)} | seen.grads
    roles = defaultdict(list)
    for name, tensor in named.items():
        if name in learning and tensor is None:
            tensor = torch.zeros(learning[name], device=seen.outputs[0].device)
        if name.startswith(("output", "input")) or name in learning:
            roles[role_of(name)].append(tensor.flatten())
        else:
            assert tensor is None, f"{name} is frozen, yet it got a gradient"
    return {role: torch.cat(tensors) for role, tensors in roles.items()}


def sample(case, compiled, module, seed, device):
    """One seed: ours, naive, and float64 with the experts that naive chose."""
    naive = case.make(seed, torch.bfloat16).to(device)
    exact = copy.deepcopy(naive).double()
    module.load_state_dict(naive.state_dict())
    learning = {name: parameter.shape for name, parameter in naive.named_parameters() if parameter.requires_grad}
    x = hidden_states(TOKENS, seed, torch.bfloat16, device=device)
    x_exact = x.detach().double().requires_grad_()
    with RecordChoices() as record:
        seen_naive = observe(naive, naive, x, seed=seed)
    with ReplayChoices(record.choices), FloatMeansDouble():
        seen_exact = observe(exact, exact, x_exact, seed=seed, grad_dtype=torch.bfloat16)
    seen_ours = observe(compiled, module, x, seed=seed)
    return Sample(*(by_role(seen, learning) for seen in (seen_ours, seen_naive, seen_exact)))


def seeds_needed(case):
    """Enough that the smallest role has MIN_ELEMENTS elements."""
    counts = defaultdict(int)
    for name, parameter in case.make().named_parameters():
        if parameter.requires_grad:
            counts[role_of(name)] += parameter.numel()
    return max(MIN_SEEDS, *(-(-MIN_ELEMENTS // count) for count in counts.values()))


@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_errors_are_those_of_naive_code(case, device):
    fresh_dynamo()
    module = case.make(0, torch.bfloat16).to(device)
    compiled = compile_ours(module, fullgraph=True)
    samples = [sample(case, compiled, module, seed, device) for seed in range(seeds_needed(case))]
    assert rewritten() == case.regions
    assert_low_precision(samples, torch.bfloat16, LIMITS.get(case.name, {}))
