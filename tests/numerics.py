"""The numerical rule that every comparison of two computations follows.

The truth is a float64 run of the naive code on the same inputs. A gradient of None equals zeros.

float32 and float64: no element is off by more than 2e-5 (1e-12) of the tensor's largest value.
bfloat16 and float16: over at least 8 seeds and 4096 elements the relative RMS error is at most 1.05 times that of the
naive code in the same dtype, or what rounding the truth once gives, and no element is off by more than 3 times the
worst of these two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
MIN_SEEDS, MIN_ELEMENTS = 8, 4096

Results = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Sample:
    """What one seed gave: tensors by name (outputs and gradients) of the candidate, the naive code and the truth."""

    candidate: Results
    naive: Results
    truth: Results


def assert_exact(candidate: Results, truth: Results, dtype: torch.dtype = torch.float32) -> None:
    """The rule for float32 (and float64); dtype is that of the computation, results may be narrower."""
    assert candidate.keys() == truth.keys()
    for name, expected in truth.items():
        expected, given = _both(expected, candidate[name])
        if expected is None or given is None or expected.numel() == 0:
            continue
        tolerance = max(TOLERANCE[dtype], TOLERANCE[given.dtype])
        error = (given.double() - expected.double()).abs().max().item()
        limit = tolerance * expected.abs().max().item()
        assert error <= limit, f"{name}: off by {error:.3g}, accepted is {limit:.3g}"


def assert_low_precision(
    samples: Sequence[Sample], dtype: torch.dtype, limits: Mapping[str, float] = MappingProxyType({})
) -> None:
    """The rule for bfloat16 and float16; dtype is that of the computation.

    limits: for tensors where the README says that it is not 1.05 times the error of the naive code.
    """
    assert len(samples) >= MIN_SEEDS, f"got {len(samples)} seeds, accepted are at least {MIN_SEEDS}"
    for name in samples[0].truth:
        rows = [(s.candidate[name], s.naive[name], s.truth[name]) for s in samples]
        given = [row for row in rows if row[2] is not None or row[0] is not None]
        _assert_pooled(name, given, dtype, limits.get(name, 1.05))


def _assert_pooled(
    name: str, rows: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]], dtype: torch.dtype, of_naive: float
) -> None:
    if not rows:
        return
    like = next(tensor for row in rows for tensor in row if tensor is not None)
    candidate, naive, truth = (
        torch.cat([_flat(tensor, like) for tensor in column]) for column in zip(*rows, strict=True)
    )
    assert truth.numel() >= MIN_ELEMENTS, f"{name}: got {truth.numel()} elements, accepted are at least {MIN_ELEMENTS}"
    output_dtype = next((row[0].dtype for row in rows if row[0] is not None), dtype)
    errors = [(tensor - truth).abs() for tensor in (candidate, naive, truth.to(output_dtype).double())]
    rms, naive_rms, rounding_rms = (error.square().mean().sqrt().item() for error in errors)
    limit = max(of_naive * naive_rms, rounding_rms)  # all three relative to the same truth: its size cancels
    assert rms <= limit, f"{name}: RMS error {rms:.4g}, accepted is {limit:.4g} (naive {naive_rms:.4g})"
    worst, naive_worst, rounding_worst = (error.max().item() for error in errors)
    limit = 3 * max(naive_worst, rounding_worst)
    assert worst <= limit, f"{name}: worst element off by {worst:.4g}, accepted is {limit:.4g}"


def _both(expected: Tensor | None, given: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if expected is None and given is not None:
        return torch.zeros_like(given), given
    if given is None and expected is not None:
        return expected, torch.zeros_like(expected)
    return expected, given


def _flat(tensor: Tensor | None, like: Tensor) -> Tensor:
    return (torch.zeros_like(like) if tensor is None else tensor).detach().double().flatten()
