"""LoRA on stacked experts: what peft computes, without a tensor as large as the weights."""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.profiler import profile

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.lora.common import GPT_OSS, PARAMETERS, QWEN3, draw, lora
from tests.models.configs import batch
from tests.models.test_causal_lm import flat

peft = pytest.importorskip("peft")

from peft.tuners.lora.layer import ParamWrapper  # noqa: E402

slow = pytest.mark.slow
each_layout = pytest.mark.parametrize("model", [QWEN3, GPT_OSS], ids=lambda model: model.name)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def stock(model) -> dict:
    """What peft and transformers compute by themselves."""
    return observe(flat(model), model, **batch(), use_cache=False)


def ours(model, compiled=None):
    return observe(flat(model if compiled is None else compiled), model, **batch(), use_cache=False)


def operators() -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes}


@each_layout
@pytest.mark.parametrize(
    "experts", ["eager", *(pytest.param(name, marks=slow) for name in ("grouped_mm", "batched_mm"))]
)
def test_backend(model, experts):
    """In one graph, whichever way transformers runs the experts."""
    expected, module = stock(lora(model, "eager")), lora(model, experts)
    actual = ours(module, compile_ours(module, fullgraph=True))
    assert_same(actual, expected)
    assert rewritten() == model.moe_layers and len(graphs) == 1
    assert not any("baddbmm" in name for name in operators())


@each_layout
@pytest.mark.parametrize("backend", [None, "counting_aot_eager", pytest.param("scatter_moe", marks=slow)])
def test_experts_implementation(model, backend):
    expected, module = stock(lora(model, "eager")), lora(model, "scatter_moe")
    compiled = None if backend is None else torch.compile(module, backend=backend, fullgraph=True)
    assert_same(ours(module, compiled), expected)


@pytest.mark.gpu
@each_layout
def test_on_a_gpu(model):
    """Both ways, with float32 products that aren't rounded to TF32."""
    on_gpu = {name: tensor.cuda() for name, tensor in batch().items()}
    expected, module = lora(model, "eager").cuda(), lora(model, "eager").cuda()
    native = lora(model, "scatter_moe").cuda()
    truth = observe(flat(expected), expected, **on_gpu, use_cache=False)
    compiled = compile_ours(module, inner="inductor", fullgraph=True)
    assert_same(observe(flat(compiled), module, **on_gpu, use_cache=False), truth)
    assert_same(observe(flat(native), native, **on_gpu, use_cache=False), truth)
    assert rewritten() == model.moe_layers


@slow
def test_stock_backend_still_breaks():
    """Without us peft's wrapper isn't traced whole: what is tested above would hold by itself otherwise."""
    module = lora(QWEN3, "grouped_mm")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, backend="eager", fullgraph=True)(**batch())


def test_eager_is_peft_itself(monkeypatch):
    module = lora(QWEN3, "eager")
    expected = stock(module)
    monkeypatch.setattr(ParamWrapper, "forward", ParamWrapper.forward.scatter_moe_original)
    again = stock(module)
    assert all(torch.equal(a, b) for a, b in zip(again.outputs, expected.outputs, strict=True))


@slow
@pytest.mark.parametrize("experts", ["eager", "scatter_moe"])
def test_two_adapters_and_changes_after_compile(experts):
    """Another adapter, both at once, none, a scale: each compiled call does what peft does."""
    reference, module = lora(QWEN3, "eager"), lora(QWEN3, experts)
    for model in (reference, module):
        model.add_adapter("other", model.peft_config["default"])
        draw(model, seed=1)
    compiled = compile_ours(module)

    def change(model, step: str) -> None:
        wrappers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        if step == "both":
            model.base_model.set_adapter(["default", "other"])
        elif step == "scaled":
            for wrapper in wrappers:
                wrapper.scaling["other"] *= 0.5
        elif step == "none":
            model.base_model.disable_adapter_layers()
        else:
            model.set_adapter(step)

    for step in ("default", "other", "both", "scaled", "none"):
        for model in (reference, module):
            change(model, step)
        actual, expected = ours(module, compiled), stock(reference)
        assert_same(actual, expected)


@pytest.mark.parametrize("experts", [pytest.param("eager", marks=slow), "scatter_moe"])
def test_merged(experts):
    reference, module = lora(QWEN3, "eager"), lora(QWEN3, experts)
    reference.merge_adapter()
    module.merge_adapter()
    assert_same(ours(module, compile_ours(module)), stock(reference))


def test_hooks_of_a_wrapper_run():
    """The inner wrapper is skipped only where nobody would notice."""
    module, seen = lora(QWEN3, "scatter_moe"), []
    inner = next(
        m for m in module.modules() if isinstance(m, ParamWrapper) and not isinstance(m.base_layer, ParamWrapper)
    )
    inner.register_forward_hook(lambda *_: seen.append("called"))
    actual = ours(module)
    assert seen == ["called"]
    for ours_, stock_ in zip(actual.outputs, stock(lora(QWEN3, "eager")).outputs, strict=True):
        torch.testing.assert_close(ours_, stock_)


def wide_experts(width: int):
    """One layer whose stacked weights are far larger than everything else that a few tokens need."""
    sizes = {"hidden_size": width, "moe_intermediate_size": width // 2, "num_experts": 16, "num_hidden_layers": 1}
    return type(QWEN3)("Qwen3Moe", QWEN3.extra | sizes)


@pytest.mark.parametrize("route", ["backend", "experts implementation", "peft"])
def test_no_tensor_of_the_size_of_a_weight(route, device):
    """A training step needs less memory than one stacked weight has, so neither a sum nor a gradient of it exists."""
    module = lora(wide_experts(1024 if device == "cuda" else 128), "scatter_moe" if "impl" in route else "eager")
    module.get_input_embeddings().requires_grad_(True)  # x needs a gradient
    model = compile_ours(module.to(device), inner="aot_eager") if route == "backend" else module.to(device)
    tokens = torch.arange(8, device=device)[None]

    def step():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        module.zero_grad()

    step()
    most, smaller_weight = peak_bytes(step, device), module.get_parameter(DOWN).nbytes
    assert most >= smaller_weight if route == "peft" else most < smaller_weight, f"{most:,} bytes"
    assert counters["scatter_moe"]["rewritten"] == int(route == "backend")


DOWN = "base_model.model.model.layers.0.mlp.experts.base_layer.base_layer.down_proj"


def peak_bytes(step, device) -> int:
    """The most that one step holds at a time beside what there was before it, within operators too."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as run:
        step()
    changes = sorted((e for e in run.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(change.nbytes() for change in changes))


@pytest.mark.parametrize("experts", [pytest.param("eager", marks=slow), "scatter_moe"])
def test_adapters_are_saved_and_loaded_by_peft(experts, tmp_path):
    """After a step of training under the backend, or on our implementation, in files that peft alone reads."""
    module = lora(QWEN3, experts)
    compiled = compile_ours(module) if experts == "eager" else module
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    compiled(**batch(), use_cache=False).loss.backward()
    optimizer.step()
    module.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(QWEN3.make("eager"), tmp_path, is_trainable=True)
    assert set(fresh.peft_config["default"].target_parameters) == set(PARAMETERS)
    assert_same(ours(module), stock(fresh))


def test_base_weights_round_trip_through_safetensors(tmp_path):
    """The names and the bytes of a checkpoint are transformers' own."""
    from safetensors.torch import load_file

    for experts in ("eager", "scatter_moe"):
        QWEN3.make(experts).save_pretrained(tmp_path / experts)
    files = [load_file(tmp_path / experts / "model.safetensors") for experts in ("eager", "scatter_moe")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    again = type(QWEN3.make()).from_pretrained(tmp_path / "scatter_moe")
    expected = QWEN3.make().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
