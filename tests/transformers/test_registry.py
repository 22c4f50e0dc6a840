"""`import scatter_moe` is all it takes, before transformers or after it, and it doesn't import transformers."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from scatter_moe.transformers import experts_forward, register_when_imported
from tests.models.configs import MODELS, batch
from tests.numerics import assert_exact

MIXTRAL, *_ = MODELS


def in_a_fresh_process(*lines: str) -> None:
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300)


REGISTERED = (
    "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as experts",
    "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as fp8",
    "assert 'scatter_moe' in experts and 'scatter_moe' in fp8",
)


def test_scatter_moe_first():
    in_a_fresh_process("import scatter_moe, sys", "assert 'transformers' not in sys.modules", *REGISTERED)


def test_transformers_first():
    in_a_fresh_process("import transformers.modeling_utils", "import scatter_moe", *REGISTERED)


def test_one_finder_however_often():
    before = len(sys.meta_path)
    register_when_imported()
    register_when_imported()
    assert len(sys.meta_path) == before
    assert ALL_EXPERTS_FUNCTIONS["scatter_moe"] is experts_forward


def test_set_and_from_pretrained(tmp_path):
    eager = MIXTRAL.make("eager").eval()
    eager.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = {"logits": eager(**batch()).logits}
        eager.set_experts_implementation("scatter_moe")
        assert_exact({"logits": eager(**batch()).logits}, expected)
        how = {"experts_implementation": "scatter_moe", "attn_implementation": "eager"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
        assert loaded.config._experts_implementation == "scatter_moe"
        assert_exact({"logits": loaded(**batch()).logits}, expected)


def test_fp8_experts_say_what_to_do():
    forward = ALL_FP8_EXPERTS_FUNCTIONS.get_interface("scatter_moe", None)
    with pytest.raises(NotImplementedError, match=r"Linear: experts_implementation='scatter_moe' takes .* not FP8"):
        forward(torch.nn.Linear(2, 2), torch.ones(2, 2))
