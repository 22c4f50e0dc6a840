"""transformers' Trainer, in the two documented ways: the losses are those of eager experts."""

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import PrinterCallback, Trainer, TrainingArguments

from tests.backend.harness import fresh_dynamo
from tests.lora.common import QWEN3, lora
from tests.models.configs import batch
from tests.numerics import TOLERANCE

INNER = {"inner_backend": "aot_eager"}
STEPS = 3


def losses(model, folder, **settings) -> list[float]:
    inputs = batch(length=16)
    data = [{name: tensor[i % 2] for name, tensor in inputs.items()} for i in range(8)]
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def make(experts: str, with_lora: bool, router_logits: bool):
    model = lora(QWEN3, experts) if with_lora else QWEN3.make(experts)
    model.config.output_router_logits, model.config.use_cache = router_logits, False
    return model


CASES = {
    "plain": ({}, False, False),
    "bf16": ({"bf16": True}, False, False),
    "checkpointing": ({"gradient_checkpointing": True}, False, False),
    "router logits": ({}, False, True),
    "bf16, LoRA": ({"bf16": True}, True, False),
    "bf16, checkpointing, router logits": ({"bf16": True, "gradient_checkpointing": True}, False, True),
}
QUICK = "bf16, LoRA"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in CASES]
)
@pytest.mark.parametrize("way", ["backend", "experts implementation"])
def test_same_losses(case, way, tmp_path):
    fresh_dynamo()
    settings, with_lora, router_logits = CASES[case]
    expected = losses(make("eager", with_lora, router_logits), tmp_path, **settings)
    model = make("eager" if way == "backend" else "scatter_moe", with_lora, router_logits)
    if way == "backend":
        model.compile(backend="scatter_moe", options=INNER)
    actual = losses(model, tmp_path, **settings)
    assert len(actual) == STEPS
    limit = torch.finfo(torch.bfloat16).eps if "bf16" in case else TOLERANCE[torch.float32]
    for ours, eager in zip(actual, expected, strict=True):
        assert abs(ours - eager) <= limit * eager
    left_to_eager = "checkpointing" in case and router_logits
    rewritten = QWEN3.moe_layers if way == "backend" and not left_to_eager else 0
    assert counters["scatter_moe"]["rewritten"] == rewritten
