"""Every block of the zoo under the backend: found, one graph, any length, and equal to eager forward and backward."""

import pytest
import torch

import scatter_moe
from tests.backend.harness import assert_same, can_be_cached, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.forms.table import TABLE
from tests.zoo import ZOO, hidden_states
from tests.zoo.common import D

MUST = [case for case in ZOO if case.must_rewrite]
MAY = [case for case in ZOO if not case.must_rewrite]
FORM_OF = {name: form for form, row in TABLE.items() for name in row.programs}
NEVER_CACHED = ("phimoe_445_train", "sorted_slots_under_autocast")
"""These hold what AOTAutograd's cache takes in no graph: an autograd function, a switch of autocast."""
WITH_INDUCTOR = ("stacked_sentinel", "mixtral_445", "gpt_oss_5", "range_lora")

# One of each form, guard and kind of body; the others are slow.
QUICK = frozenset(
    """mixtral_436 mixtral_451 mixtral_457 qwen2_moe_445 qwen3_moe_451 deepseek_v3_457 deepseek_v3_enumerate
    stacked_sentinel stacked_top_1 stacked_relu2 gpt_oss_5 phimoe_445_train any_guard plus_equals hit_flatten
    weight_on_input fp32_accumulator range_gelu_bias hit_swiglu_fused range_lora hit_layer_norm_first
    sorted_slots gathered_einsum gathered_batched_mm gathered_norm dense_einsum
    dense_added_by_number dense_modules_sum dense_modules_gather expert_by_name
    slot_columns segments_array segments_residual
    dropped_one_hot hit_unpacked views_halves_in_one_index views_unbound temporaries_gated
    switch_lists flat_paired dense_sequences_einsum dense_sequences_cut dense_modules_where
    merged_loop merged_stacked hit_list_set
    filtered_comprehension choices_assigned loads_counted_of_hit gate_lists gate_lists_closed
    summed_stacked summed_one_buffer
    tallies_scatter_added tallies_listed_sums""".split()
)


def quick(cases, names=QUICK):
    """The cases as parameters, those outside `names` marked slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(case, id=case.name, marks=[] if case.name in names else slow) for case in cases]


def named(*names):
    return [case for case in ZOO if case.name in names]


def any_length(tokens, seed=0, device="cpu"):
    x = hidden_states(tokens, seed=seed, device=device)
    torch._dynamo.mark_dynamic(x, 1)
    return x


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@pytest.mark.parametrize("case", quick(MUST))
def test_block_is_rewritten_and_equal(case, device):
    eager, module = case.make().to(device), case.make().to(device)
    compiled = compile_ours(module, fullgraph=True)
    for seed, tokens in enumerate((24, 32, 4)):
        actual = observe(compiled, module, any_length(tokens, seed, device), seed=seed)
        assert_same(actual, observe(eager, eager, any_length(tokens, seed, device), seed=seed))
    assert rewritten() == case.regions
    assert len(graphs) == 1
    assert can_be_cached(graphs[0]) or case.name in NEVER_CACHED


@pytest.mark.parametrize("case", quick(MUST, ("mixtral_451", "stacked_sentinel", "gpt_oss_5", "range_lora")))
def test_explain_describes_the_region(case):
    report = scatter_moe.explain(case.make(), hidden_states())
    assert len(report.regions) == case.regions
    region = report.regions[0]
    assert {region.form for region in report.regions} == {FORM_OF[case.name]}
    assert (region.num_experts, region.top_k) == (case.num_experts, case.top_k)
    if case.op is not None:
        assert region.op == case.op
    if case.op == "mlp":
        assert region.activation == case.activation
    assert "zoo" in region.source


@pytest.mark.parametrize("case", quick(MAY, ("deepseek_v2_train", "any_mask_rows", "switch_assignment")))
def test_block_is_equal_whether_rewritten_or_not(case):
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    for seed, tokens in enumerate((24, 32)):
        actual = observe(compiled, module, hidden_states(tokens, seed), seed=seed)
        assert_same(actual, observe(eager, eager, hidden_states(tokens, seed), seed=seed))


@pytest.mark.parametrize("case", quick(named(*WITH_INDUCTOR), ("stacked_sentinel",)))
def test_block_through_inductor(case, device):
    eager, module = case.make().to(device), case.make().to(device)
    compiled = compile_ours(module, inner="inductor", fullgraph=True)
    x = hidden_states(device=device)
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
    assert rewritten() == 1


@pytest.mark.parametrize("case", quick(MUST, ("mixtral_451", "stacked_sentinel", "range_gelu_bias")))
def test_block_without_gradients(case):
    eager, module = case.make().eval(), case.make().eval()
    compiled = compile_ours(module, inner="counting_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        x = hidden_states(requires_grad=False)
        with mode():
            assert_same(observe(compiled, module, x, backward=False), observe(eager, eager, x, backward=False))
    assert rewritten() == case.regions * len(graphs)


@pytest.mark.parametrize("case", named("mixtral_445", "stacked_sentinel", "deepseek_v3_457"), ids=lambda c: c.name)
def test_frozen_parameters_get_no_gradient(case):
    eager, module = case.make(), case.make()
    for block in (eager, module):
        for index, parameter in enumerate(block.parameters()):
            parameter.requires_grad_(index % 2 == 0)
    compiled = compile_ours(module, fullgraph=True)
    actual, expected = observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states())
    assert_same(actual, expected)
    assert all(module.get_parameter(n).requires_grad or actual.grads[n] is None for n, _ in module.named_parameters())
    assert rewritten() == 1


def test_gradient_of_the_clamp_at_its_limits():
    """Where gate and up are exactly at the limit, a clamp hands gradients on."""
    (case,) = named("gpt_oss_5")
    eager, module = case.make(), case.make()
    for block in (eager, module):
        torch.nn.init.zeros_(block.experts.gate_up_proj)
        with torch.no_grad():
            block.experts.gate_up_proj_bias.copy_(block.experts.limit * torch.tensor([1.0, -1.0]).repeat(24))
            block.experts.gate_up_proj_bias[:, :8] *= -1
    compiled = compile_ours(module)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1


@pytest.mark.parametrize("case", named("mixtral_445", "stacked_sentinel"), ids=lambda case: case.name)
def test_block_without_tokens(case):
    """An empty batch: empty outputs, and parameters get zeros or nothing."""
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    x = torch.zeros(2, 0, D, requires_grad=True)
    assert_same(observe(compiled, module, x), observe(eager, eager, x))
