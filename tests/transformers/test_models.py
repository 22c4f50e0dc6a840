"""Whole models on the experts implementation "scatter_moe": outputs and gradients are those of their own loops.

In float64 nothing hides a difference. In float32 a whole model may amplify rounding to more than the rule allows,
whoever computes its experts: these few models are compared in float64 alone, their experts in `test_experts.py`.
"""

import pytest
import torch

pytest.importorskip("transformers")

from tests.backend.harness import observe
from tests.models.architectures import Architecture, architectures
from tests.models.tiny import first_output, token_ids
from tests.numerics import assert_exact

pytestmark = pytest.mark.slow

MODELS = [a for a in architectures() if a.dispatched and a.model_class is not None]
# Their code computes parts in float32 whatever the weights are.
FLOAT32_INSIDE = ("beam", "inkling2", "muse_spark", "nemotron_h", "openai_privacy_filter")
# Linear attention's recurrences, hyper-connections, a router's gradient that is zero but for rounding, and layers whose
# own loop is as far from float64 if the terms of its products are added in another order (tests.models.equality).
AMPLIFY_ROUNDING = ("bailing_hybrid", "deepseek_v4", "gemma4", "glm5_next", "hy_v4", "kimi_linear")
AMPLIFY_ROUNDING += ("qwen3_5_moe", "qwen3_next")


def some_models(left_out: tuple[str, ...]):
    names = [a for a in MODELS if a.name not in left_out]
    return pytest.mark.parametrize("architecture", names, ids=lambda architecture: architecture.name)


def test_causal_language_models_are_many():
    assert sum(model.model_class.__name__.endswith("ForCausalLM") for model in MODELS) >= 20


def run(architecture: Architecture, experts: str, dtype: torch.dtype):
    """Output and gradients by name. Not in training mode: its random numbers would differ between dtypes."""
    model = architecture.make("eager").eval().to(dtype)
    decorated = [m for m in model.modules() if hasattr(m, "_apply_gate") and "_is_expert_parallel" in vars(m)]
    assert decorated, "a model without experts compares nothing"
    model.set_experts_implementation(experts)
    assert all(module.config._experts_implementation == experts for module in decorated)
    seen = observe(first_output(model, model), model, token_ids(), grad_dtype=torch.float32)
    return {"output": seen.outputs[0], **seen.grads}


@some_models(left_out=FLOAT32_INSIDE)
def test_float64(architecture: Architecture):
    ours, eager = (run(architecture, experts, torch.float64) for experts in ("scatter_moe", "eager"))
    assert_exact(ours, eager, torch.float64)


@some_models(left_out=AMPLIFY_ROUNDING)
def test_float32(architecture: Architecture):
    exact = torch.float32 if architecture.name in FLOAT32_INSIDE else torch.float64
    assert_exact(run(architecture, "scatter_moe", torch.float32), run(architecture, "eager", exact))
