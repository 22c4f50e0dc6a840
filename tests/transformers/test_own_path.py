"""`explain` names the experts that no experts implementation reaches."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import JetMoeConfig, JetMoeForCausalLM, MixtralConfig
from transformers.integrations.finegrained_fp8 import FP8Experts

import scatter_moe
from scatter_moe.transformers.own_path import notes_on
from tests.models.configs import COMMON, MODELS

SIZES = {"kv_channels": 8, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}


def test_experts_without_the_interface(capsys):
    model = JetMoeForCausalLM(JetMoeConfig(**COMMON | SIZES | {"num_hidden_layers": 1}))
    explanation = scatter_moe.explain(model, torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    (note,) = explanation.notes
    assert note.startswith("model.layers.0.mlp.input_linear: JetMoeParallelExperts takes no experts implementation")
    assert f"note: {note}" in capsys.readouterr().out


def test_experts_in_fp8():
    with torch.device("meta"):
        experts = FP8Experts(MixtralConfig(**COMMON, intermediate_size=128, num_local_experts=4), block_size=(32, 32))
    (note,) = notes_on(torch.nn.ModuleDict({"experts": experts}))
    assert note.startswith("experts: FP8Experts is in FP8")


def test_nothing_to_say():
    assert list(notes_on(MODELS[0].make())) == []
