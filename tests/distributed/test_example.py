"""examples/train_expert_parallel.py survives the death of a process: torchrun says so, and the next run goes on."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_expert_parallel.py"


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--folder", str(folder), "--steps", str(steps), "--save-every", "5", "--report-every", "1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, str(EXAMPLE), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def losses(lines: list[str]) -> dict[int, str]:
    found = (re.match(r"step +(\d+) +loss ([\d.]+)", line) for line in lines)
    return {int(match[1]): match[2] for match in found if match}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_run_is_resumed(tmp_path):
    whole = start(tmp_path / "whole", 12)
    expected = losses(whole.communicate(timeout=400)[0].splitlines())
    assert whole.returncode == 0

    killed = start(tmp_path / "killed", 1000)
    assert killed.stdout is not None
    for line in killed.stdout:
        if re.match(r"step +8 ", line):
            break
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed.communicate(timeout=400)
    assert killed.returncode != 0

    resumed = start(tmp_path / "killed", 12)
    output = resumed.communicate(timeout=400)[0]
    assert resumed.returncode == 0
    assert "starting at step 5 of 12" in output
    assert losses(output.splitlines()) == {step: loss for step, loss in expected.items() if step > 5}
