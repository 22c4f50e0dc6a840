"""A fine-tune by Trainer: the loss is that of eager experts, or strays no further than transformers' grouped_mm does.

In float32 on the CPU it is the same to the bit. In bf16 any other order of additions gives another curve, and how far
apart two curves get is chance. So the largest gap is taken over several seeds, on both sides.
"""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.fine_tune import WAYS, measure

SEEDS, STEPS = 3, 200


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_in_float32_is_that_of_eager():
    ways = {name: WAYS[name] for name in ("eager", "experts implementation")}
    eager, ours = measure(ways, lora=False, steps=20, bf16=False, seed=0)
    assert eager["last loss"] < eager["first loss"]
    assert ours == eager | {"way": "experts implementation"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["all", "LoRA"])
def test_gap_to_eager(lora):
    ways = {name: WAYS[name] for name in ("eager", "grouped_mm", "experts implementation")}
    rows = [row for seed in range(SEEDS) for row in measure(ways, lora, STEPS, bf16=True, seed=seed)]
    assert all(row["last loss"] < row["first loss"] for row in rows)
    largest = {name: max(row["gap"] for row in rows if row["way"] == name) for name in ways}
    assert 0 < largest["experts implementation"] <= largest["grouped_mm"]
