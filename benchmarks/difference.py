"""How far a result is from another: what a benchmark checks before it times anything."""

from torch import Tensor


def relative_rms(result: Tensor, expected: Tensor) -> float:
    """RMS of the difference over that of `expected`."""
    result, expected = result.float(), expected.float()
    return ((result - expected).norm() / expected.norm()).item()
