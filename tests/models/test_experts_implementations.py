"""transformers' grouped_mm (its default) and batched_mm: all rewritten, equal in float32, as exact in bfloat16."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.models.configs import MODELS, batch
from tests.models.test_causal_lm import flat
from tests.numerics import MIN_ELEMENTS, MIN_SEEDS, Sample, assert_low_precision

NAMES = ("Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3")
each_model = pytest.mark.parametrize("model", [m for m in MODELS if m.name in NAMES], ids=lambda model: model.name)
all_models = pytest.mark.parametrize(
    "model",
    [pytest.param(m, id=m.name, marks=[] if m.name in NAMES else [pytest.mark.slow]) for m in MODELS],
)
each_implementation = pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
TOKENS = 256


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


class Alone(torch.nn.Module):
    """Experts, told that all that they are given is of the same number of tokens, as it is behind a router."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, ids, weights):
        torch._check(ids.shape[0] == x.shape[0])
        torch._check(weights.shape[0] == x.shape[0])
        return self.experts(x, ids, weights)


def experts_of(model, implementation):
    """The experts of the first MoE layer, alone."""
    modules = model.make(implementation).modules()
    experts = next(module for module in modules if hasattr(module, "down_proj") and hasattr(module, "gate_up_proj"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim == 3 else 0.3)
    return Alone(experts)


def routed(model, alone, tokens, seed, dtype):
    """hidden_states, top_k_index, top_k_weights."""
    generator = torch.Generator().manual_seed(seed)
    experts = alone.experts
    width = experts.down_proj.shape[-1 if experts.is_transposed else -2]
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights, ids = torch.rand(tokens, model.num_experts, generator=generator).topk(model.top_k, dim=-1)
    weights = weights.to(dtype).requires_grad_()
    for tensor in (x, ids, weights):
        torch._dynamo.mark_dynamic(tensor, 0)
    return x, ids, weights


@all_models
@each_implementation
def test_training_step(model, implementation):
    naive, module = model.make(implementation), model.make(implementation)
    compiled = compile_ours(module, fullgraph=True)
    actual = observe(flat(compiled), module, **batch(), use_cache=False)
    assert_same(actual, observe(flat(naive), naive, **batch(), use_cache=False))
    assert rewritten() == model.moe_layers
    assert len(graphs) == 1


@each_model
@each_implementation
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_experts_alone_for_any_number_of_tokens(model, implementation, expert_parallel):
    naive, module = experts_of(model, implementation), experts_of(model, implementation)
    naive.experts._is_expert_parallel = module.experts._is_expert_parallel = expert_parallel
    compiled = compile_ours(module, fullgraph=True)
    for seed, tokens in enumerate((24, 40, 7)):
        actual = observe(compiled, module, *routed(model, module, tokens, seed, torch.float32), seed=seed)
        assert_same(actual, observe(naive, naive, *routed(model, naive, tokens, seed, torch.float32), seed=seed))
    assert rewritten() == len(graphs) == 1


@each_implementation
def test_ids_of_other_ranks(implementation):
    """Under expert parallelism an id of num_experts is nobody's: its slots give zeros."""
    (model,) = (model for model in MODELS if model.name == "GptOss")
    naive, module = experts_of(model, implementation), experts_of(model, implementation)
    naive.experts._is_expert_parallel = module.experts._is_expert_parallel = True
    x, ids, weights = routed(model, module, 40, 0, torch.float32)
    ids.masked_fill_(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, model.num_experts)
    actual = observe(compile_ours(module, fullgraph=True), module, x, ids, weights)
    assert_same(actual, observe(naive, naive, x, ids, weights))
    assert rewritten() == 1


@each_model
@each_implementation
def test_bf16(model, implementation):
    module = experts_of(model, implementation).bfloat16()
    naive, exact = copy.deepcopy(module), experts_of(model, "eager")
    exact.load_state_dict(module.state_dict())
    exact = exact.double()
    compiled = compile_ours(module, fullgraph=True)
    samples = []
    smallest = min(parameter.numel() for parameter in module.parameters())
    for seed in range(max(MIN_SEEDS, math.ceil(MIN_ELEMENTS / smallest))):
        x, ids, weights = routed(model, module, TOKENS, seed, torch.bfloat16)
        x64, weights64 = (tensor.detach().double().requires_grad_() for tensor in (x, weights))
        seen_exact = observe(exact, exact, x64, ids, weights64, seed=seed, grad_dtype=torch.bfloat16)
        seen = (
            observe(compiled, module, x, ids, weights, seed=seed),
            observe(naive, naive, x, ids, weights, seed=seed),
        )
        samples.append(Sample(*({"out": s.outputs[0], **s.grads} for s in (*seen, seen_exact))))
    assert_low_precision(samples, torch.bfloat16)
    assert rewritten() == 1


def test_autocast_does_not_reach_the_products():
    """Autocast leaves grouped_mm alone, but would reach our operators: fp32 experts stay fp32."""
    (model,) = (model for model in MODELS if model.name == "Mixtral")
    naive, module = experts_of(model, "grouped_mm"), experts_of(model, "grouped_mm")
    compiled = compile_ours(module, fullgraph=True)
    inputs = routed(model, module, 24, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(observe(compiled, module, *inputs), observe(naive, naive, *inputs))
    assert rewritten() == 1
