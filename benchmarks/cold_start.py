"""Seconds of a shape's first forward and backward when nothing is compiled: python -m benchmarks.cold_start D C.

Each shape runs in a process of its own with an empty cache of Triton's. The clock starts when CUDA is up and the inputs
are there.
"""

import argparse
import os
import subprocess
import sys
import tempfile

import torch

from benchmarks import report, timing
from benchmarks.shapes import SHAPES, inputs, shape_names
from benchmarks.training_step import step


def measure(name: str) -> float:
    layer = inputs(SHAPES[name], torch.bfloat16, "cuda")
    for tensor in (layer.x, layer.topk_weights, layer.gate_up, layer.down):
        tensor.requires_grad_()
    torch.cuda.synchronize()
    return timing.seconds(lambda: step(layer))


def measure_in_process(name: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.cold_start", "--measure", name]
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; B, C and D if none is named")
    parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure))
        return
    names = shape_names(parser, arguments.shapes)
    rows = [{"shape": name, "first_step_s": measure_in_process(name)} for name in names]
    report.append("cold_start", rows)
    report.print_table("first forward and backward, nothing compiled yet", rows)


if __name__ == "__main__":
    main()
