"""In bfloat16 a rewritten block is as close to float64 as the naive code is, pooled over seeds, tensor by tensor."""

import copy
import re
from collections import defaultdict

import pytest
import torch

from tests.backend.harness import Seen, compile_ours, fresh_dynamo, observe, rewritten
from tests.backend.replay import RecordChoices, ReplayChoices
from tests.numerics import MIN_ELEMENTS, MIN_SEEDS, Sample, assert_low_precision
from tests.zoo import ZOO, hidden_states

TOKENS = 48
QUICK = ("mixtral_445", "deepseek_v3_457", "stacked_sentinel", "gpt_oss_5", "range_gelu_bias", "range_lora")
CASES = [case for case in ZOO if case.must_rewrite and not case.random]


def by_role(seen: Seen):
    """Outputs and gradients, with the parameters of all experts as one: experts.3.w1 and experts.0.w1 play one role."""
    named = {f"output {i}": leaf for i, leaf in enumerate(seen.outputs)} | seen.grads
    roles = defaultdict(list)
    for name, tensor in named.items():
        if tensor is not None:
            roles[re.sub(r"\.\d+\.", ".*.", name)].append(tensor.flatten())
    return {role: torch.cat(tensors) for role, tensors in roles.items()}


def sample(case, compiled, module, seed):
    """One seed: ours, naive, and float64 with the experts that naive chose."""
    naive = case.make(seed, torch.bfloat16)
    exact = copy.deepcopy(naive).double()
    module.load_state_dict(naive.state_dict())
    x = hidden_states(TOKENS, seed, torch.bfloat16)
    x_exact = x.detach().double().requires_grad_()
    with RecordChoices() as record:
        seen_naive = observe(naive, naive, x, seed=seed)
    with ReplayChoices(record.choices):
        seen_exact = observe(exact, exact, x_exact, seed=seed, grad_dtype=torch.bfloat16)
    seen_ours = observe(compiled, module, x, seed=seed)
    return Sample(zeros_for_none(seen_ours), zeros_for_none(seen_naive), zeros_for_none(seen_exact))


def zeros_for_none(seen: Seen):
    """An expert without tokens: None in eager, zeros in ours."""
    like = {name: tensor for name, tensor in seen.grads.items() if tensor is None}
    assert not like, f"every expert has tokens in these inputs, yet {sorted(like)} got no gradient"
    return by_role(seen)


def seeds_needed(case):
    """Enough that the smallest tensor has MIN_ELEMENTS elements."""
    counts = defaultdict(int)
    for name, parameter in case.make().named_parameters():
        if parameter.requires_grad:
            counts[re.sub(r"\.\d+\.", ".*.", name)] += parameter.numel()
    return max(MIN_SEEDS, *(-(-MIN_ELEMENTS // count) for count in counts.values()))


@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_errors_are_those_of_naive_code(case):
    fresh_dynamo()
    module = case.make(0, torch.bfloat16)
    compiled = compile_ours(module, fullgraph=True)
    samples = [sample(case, compiled, module, seed) for seed in range(seeds_needed(case))]
    assert rewritten() == 1
    assert_low_precision(samples, torch.bfloat16)
