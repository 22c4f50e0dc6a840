"""Every example runs from the command line; a few steps show that it does what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SLOW = {"quickstart.py"}  # compiles a whole model twice
MODULES = {"modulelist_moe.py"}  # imported by the quickstart: `--model modulelist`
TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
LAUNCHERS = {"train_expert_parallel.py": TWO_PROCESSES, "trainer_dispatch.py": TWO_PROCESSES}
# What an example prints only if it came to its end, and what it leaves behind.
EXPECTED = {
    "custom_expert.py": ("step    5  loss", []),
    "mixture_of_attention.py": ("decoding with a cache", []),
    "direct_ops.py": ("fused", []),
    "fine_tune.py": ("adapters saved and loaded by peft", []),
    "quickstart.py": ("Curves and times", ["runs/quickstart-qwen3-cpu.png"]),
    "research_loop.py": ("largest difference of the loss", []),
    "train_expert_parallel.py": ("loss", []),
    "trainer_dispatch.py": ("largest difference of the loss", []),
    "routers.py": ("deepseek_v3", ["runs/routers-top2.png", "runs/routers-deepseek_v3.png"]),
}


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED) | MODULES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in EXPECTED]
)
def test_example_runs(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "120"}
    command = [sys.executable, *LAUNCHERS.get(name, []), str(EXAMPLES / name), "--steps", "5"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed, files = EXPECTED[name]
    assert printed in result.stdout
    assert all((tmp_path / file).stat().st_size > 0 for file in files)
