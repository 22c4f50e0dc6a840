"""`generate()` with a static cache, which transformers compiles itself, under our backend."""

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

from transformers import CompileConfig

import scatter_moe  # noqa: F401  (registers the backend)
from tests.models.configs import MODELS, batch

QWEN3 = next(model for model in MODELS if model.name == "Qwen3Moe")
STATIC = {"cache_implementation": "static", "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def generate(model, **settings):
    inputs = {name: tensor.to(model.device) for name, tensor in batch().items() if name != "labels"}
    return model.generate(**inputs, **STATIC, **settings)


@pytest.mark.parametrize("experts", ["eager", pytest.param("scatter_moe", marks=pytest.mark.slow)])
def test_static_cache(experts):
    torch.compiler.reset()
    counters.clear()
    expected, model = generate(QWEN3.make().eval(), disable_compile=True), QWEN3.make(experts).eval()
    compiled = CompileConfig(backend="scatter_moe", mode=None, options={"inner_backend": "aot_eager"}, fullgraph=True)
    compiled._compile_all_devices = True  # transformers compiles on GPUs alone
    assert torch.equal(generate(model, compile_config=compiled), expected)
    assert counters["scatter_moe"]["rewritten"] == (QWEN3.moe_layers if experts == "eager" else 0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "scatter_moe"])
def test_cuda_graphs(experts):
    """transformers' default mode, "reduce-overhead", replays CUDA graphs: once more, from graphs that exist."""
    torch.compiler.reset()
    counters.clear()
    model = QWEN3.make(experts).eval().cuda()
    expected = generate(QWEN3.make().eval().cuda(), disable_compile=True)
    for _ in range(3):
        assert torch.equal(
            generate(model, compile_config=CompileConfig(backend="scatter_moe", fullgraph=True)), expected
        )
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["scatter_moe"]["rewritten"] == (0 if experts == "scatter_moe" else QWEN3.moe_layers)
