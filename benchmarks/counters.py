"""One training step for a profiler: ncu --profile-from-start off --set full python -m benchmarks.counters C D.

The profiler starts when the kernels are compiled and a step's results have been checked. It then sees each kernel of
one step of each shape once. The rows of `benchmarks/results/counters.jsonl` were taken over by hand.
"""

import argparse

import torch

from benchmarks.shapes import SHAPES, inputs, shape_names
from benchmarks.training_step import differences, differentiable, expected_step, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; B, C and D if none is named")
    arguments = parser.parse_args()
    for name in shape_names(parser, arguments.shapes):
        layer = differentiable(inputs(SHAPES[name], torch.bfloat16, "cuda", 0.0))
        errors = differences(step(layer), expected_step(layer))
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            step(layer)
            torch.cuda.synchronize()
        print(f"{name}: largest relative difference to the reference {max(errors.values()):.1e}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
