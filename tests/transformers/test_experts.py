"""The experts implementation "scatter_moe": every class that transformers decorates equals its own loop."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from docs.transformers_experts import PAGE, D, E, Experts, K, T, experts_classes, run, table
from tests.backend.harness import compile_ours, fresh_dynamo, graphs
from tests.numerics import MIN_ELEMENTS, Sample, assert_exact, assert_low_precision

CLASSES = experts_classes()
SEEDS = -(-MIN_ELEMENTS // (T * K))  # the router weights are the smallest tensor
# Fused, with bias and transposed, without a gate, with a gate of its own, with a norm.
IN_CI = ("MixtralExperts", "GptOssExperts", "NemotronHExperts", "DeepseekV4Experts", "MuseSparkExperts", "BeamExperts")
QUICK = [experts for experts in CLASSES if experts.name in IN_CI]
each_class = pytest.mark.parametrize(
    "experts", [e if e in QUICK else pytest.param(e, marks=pytest.mark.slow) for e in CLASSES], ids=str
)
some_classes = pytest.mark.parametrize("experts", QUICK, ids=str)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def operators_in(graph) -> list[str]:
    return [node.target.__name__ for node in graph.graph.nodes if "scatter_moe" in str(node.target)]


@each_class
def test_equals_its_own_loop(experts: Experts):
    assert_exact(run(experts.module("scatter_moe"), absent=E), run(experts.module("eager"), absent=E - 1))


@pytest.mark.slow
def test_the_table_is_what_runs():
    assert len(CLASSES) >= 60
    assert (
        f" classes of transformers {transformers.__version__}." not in PAGE.read_text() or table() in PAGE.read_text()
    )


@some_classes
@pytest.mark.parametrize("backend", ["counting_aot_eager", "scatter_moe"])
def test_compiles_in_one_graph(experts: Experts, backend: str):
    module = experts.module("scatter_moe")
    expected = run(module, absent=E)
    if backend == "scatter_moe":
        compiled = compile_ours(module, fullgraph=True)
    else:
        compiled = torch.compile(module, backend=backend, fullgraph=True)
    actual = run(compiled, absent=E)
    assert_exact({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected)
    fused = ["route", "mlp"]
    general = ["route", "parallel_linear", "parallel_linear", "combine"]
    (graph,) = graphs
    assert operators_in(graph) == (general if experts.name in ("DeepseekV4Experts", "MuseSparkExperts") else fused)


@some_classes
def test_low_precision(experts: Experts):
    """The weight of a norm, [D], would need hundreds of seeds: its gradient is left to the test in float32."""
    samples = []
    for seed in range(SEEDS):
        ours, naive = (experts.module(name, seed).bfloat16() for name in ("scatter_moe", "eager"))
        for parameter in (p for module in (ours, naive) for p in module.parameters() if p.dim() == 1):
            parameter.requires_grad_(False)
        wide = copy.deepcopy(naive).double()
        samples.append(
            Sample(
                run(ours, E, seed, torch.bfloat16),
                run(naive, E - 1, seed, torch.bfloat16),
                run(wide, E - 1, seed, torch.float64, torch.bfloat16),
            )
        )
    assert_low_precision(samples, torch.bfloat16)


@some_classes
def test_nothing_is_kept_for_frozen_experts(experts: Experts):
    """The rows that would be read for the gradients of weights are not among what is kept."""
    module = experts.module("scatter_moe").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=generator).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = module(x, torch.randint(0, E, (T, K), generator=generator), torch.rand(T, K, generator=generator))
    assert out.requires_grad
    assert not any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
