"""Whole models on the experts implementation "scatter_moe": a training step equals that of their own loops."""

import inspect

import pytest
import torch

pytest.importorskip("transformers")

from tests.backend.harness import assert_same, observe
from tests.models.tiny import VOCAB, Architecture, architectures

pytestmark = pytest.mark.slow

MODELS = [architecture for architecture in architectures() if architecture.model_class is not None]


def test_causal_language_models_are_many():
    assert sum(model.model_class.__name__.endswith("ForCausalLM") for model in MODELS) >= 20


@pytest.mark.parametrize("architecture", MODELS, ids=lambda architecture: architecture.name)
def test_training_step(architecture: Architecture):
    model = architecture.make("eager").train()
    decorated = [m for m in model.modules() if hasattr(m, "_apply_gate") and "_is_expert_parallel" in vars(m)]
    assert decorated, "a model without experts compares nothing"
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    ids = torch.randint(2, VOCAB - 8, (2, 8), generator=torch.Generator().manual_seed(0))

    def first_output(input_ids):
        return model(input_ids=input_ids, **options)[0]

    expected = observe(first_output, model, ids)
    model.set_experts_implementation("scatter_moe")
    assert all(module.config._experts_implementation == "scatter_moe" for module in decorated)
    assert_same(observe(first_output, model, ids), expected)
