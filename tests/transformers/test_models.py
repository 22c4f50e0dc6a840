"""Whole models on the experts implementation "scatter_moe": outputs and gradients are those of their own loops.

Some gradients of a whole model are differences of nearly equal sums, in which float32 itself loses digits. So the limit
is the rule's or, as in low precision, three times what the model's own loops are off from their float64 run.
"""

import pytest
import torch

pytest.importorskip("transformers")

from tests.backend.harness import observe
from tests.models.architectures import Architecture, architectures
from tests.models.tiny import first_output, token_ids
from tests.numerics import TOLERANCE

pytestmark = pytest.mark.slow

MODELS = [a for a in architectures() if a.dispatched and a.model_class is not None]
NOT_IN_FLOAT64 = ("inkling2",)  # their code mixes dtypes then: their float32 run is the truth
SAME_ROUTING = 1e-3  # outputs that are further from those in float64 come from other experts


def test_causal_language_models_are_many():
    assert sum(model.model_class.__name__.endswith("ForCausalLM") for model in MODELS) >= 20


def run(model):
    """Output and gradients by name. Not in training mode: its random numbers would differ between dtypes."""
    seen = observe(first_output(model, model), model, token_ids(), grad_dtype=torch.float32)
    return {"output": seen.outputs[0], **seen.grads}


@pytest.mark.parametrize("architecture", MODELS, ids=lambda architecture: architecture.name)
def test_equals_its_own_loops(architecture: Architecture):
    model = architecture.make("eager").eval()
    decorated = [m for m in model.modules() if hasattr(m, "_apply_gate") and "_is_expert_parallel" in vars(m)]
    assert decorated, "a model without experts compares nothing"
    eager = run(model)
    truth = eager if architecture.name in NOT_IN_FLOAT64 else run(architecture.make("eager").eval().double())
    assert distance(eager["output"], truth["output"]) <= SAME_ROUTING * truth["output"].abs().max()
    model.set_experts_implementation("scatter_moe")
    assert all(module.config._experts_implementation == "scatter_moe" for module in decorated)
    ours = run(model)
    assert ours.keys() == eager.keys() == truth.keys()
    for name in (name for name, exact in truth.items() if exact is not None):
        largest = truth[name].abs().max().item()
        error, own = (distance(result[name], truth[name]) for result in (ours, eager))
        limit = max(TOLERANCE[torch.float32] * largest, 3 * own)
        assert error <= limit, f"{name}: off by {error:.3g}, accepted is {limit:.3g}"


def distance(given: torch.Tensor | None, exact: torch.Tensor) -> float:
    """Of the element that is furthest off; an absent gradient is zeros."""
    return (exact if given is None else given - exact).abs().max().item()
