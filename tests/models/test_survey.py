"""The survey tells a difference from rounding that the model itself amplifies."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.backend.harness import Seen
from tests.models.survey import compare

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
SLIGHTLY, OFF = 1e-6, 1e-3


def seen(output: torch.Tensor) -> Seen:
    return Seen([output], {"weight": None}, {}, {})


def in_float32(error: float) -> Seen:
    return seen((EXACT + error).float())


def in_float64(error: float):
    return lambda: (seen(EXACT + error), seen(EXACT))


def test_equal_in_float32():
    assert compare(in_float32(SLIGHTLY), in_float32(0.0), in_float64(OFF)) == "float32"


def test_amplified_rounding_is_compared_in_float64():
    assert compare(in_float32(OFF), in_float32(-OFF), in_float64(0.0)) == "float32, float64"


def test_a_difference_that_eager_does_not_have():
    with pytest.raises(AssertionError, match="output 0"):
        compare(in_float32(OFF), in_float32(0.0), in_float64(0.0))


def test_a_difference_in_float64():
    with pytest.raises(AssertionError, match="output 0"):
        compare(in_float32(OFF), in_float32(-OFF), in_float64(SLIGHTLY))


def test_rounding_of_zero_is_not_compared():
    ours, eager, wide, wide_too = (seen(size * EXACT) for size in (1e-8, -1e-8, 1e-16, -1e-16))
    for run in (ours, eager):
        run.outputs[0] = run.outputs[0].float()
    assert compare(ours, eager, lambda: (wide, wide_too)) == "float32, float64"
    with pytest.raises(AssertionError, match="output 0"):
        compare(ours, eager, lambda: (seen(1e-8 * EXACT), wide_too))


def test_another_dtype():
    with pytest.raises(AssertionError):
        compare(seen(EXACT), in_float32(0.0), in_float64(0.0))
