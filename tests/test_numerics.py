"""The numerical rule accepts what it should and rejects what it should."""

import pytest
import torch

from tests.numerics import Sample, assert_exact, assert_low_precision


def noisy(truth, size, seed):
    return truth + size * torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(candidate_noise, naive_noise, numel=1024, seeds=8):
    result = []
    for seed in range(seeds):
        truth = noisy(torch.zeros(numel, dtype=torch.float64), 1.0, seed)
        candidate, naive = noisy(truth, candidate_noise, seed + 100).bfloat16(), noisy(truth, naive_noise, seed + 200)
        result.append(Sample({"y": candidate}, {"y": naive.bfloat16()}, {"y": truth}))
    return result


def test_as_good_as_naive_is_accepted():
    assert_low_precision(samples(0.05, 0.05), torch.bfloat16)


def test_one_rounding_is_accepted_where_naive_is_exact():
    rounded = [Sample(s.candidate, s.truth, s.truth) for s in samples(0.0, 0.0)]
    assert_low_precision(rounded, torch.bfloat16)


def test_larger_rms_is_rejected():
    with pytest.raises(AssertionError, match="y: RMS error"):
        assert_low_precision(samples(0.06, 0.05), torch.bfloat16)


@pytest.mark.parametrize("wrong", [10.0, float("nan"), float("inf")])
def test_one_wrong_element_is_rejected(wrong):
    bad = samples(0.04, 0.05)
    bad[3].candidate["y"][5] += wrong
    with pytest.raises(AssertionError, match="y: "):
        assert_low_precision(bad, torch.bfloat16)


def test_a_gradient_of_none_equals_zeros():
    zeros = torch.zeros(4096, dtype=torch.float64)
    assert_low_precision([Sample({"y": zeros}, {"y": None}, {"y": None})] * 8, torch.bfloat16)
    assert_exact({"y": None}, {"y": zeros})
    with pytest.raises(AssertionError, match="y: "):
        assert_exact({"y": None}, {"y": zeros + 1})
    with pytest.raises(AssertionError, match="y: "):
        assert_exact({"y": zeros + 1}, {"y": None})


@pytest.mark.parametrize("few", [{"numel": 100}, {"seeds": 7}])
def test_too_little_evidence_is_rejected(few):
    with pytest.raises(AssertionError, match="at least"):
        assert_low_precision(samples(0.0, 0.05, **few), torch.bfloat16)


def test_float32():
    truth = noisy(torch.zeros(100, dtype=torch.float64), 1.0, 0)
    largest = truth.abs().max()
    assert_exact({"y": (truth + 1e-5 * largest).float()}, {"y": truth})
    with pytest.raises(AssertionError, match="y: off by"):
        assert_exact({"y": (truth + 3e-5 * largest).float()}, {"y": truth})
    with pytest.raises(AssertionError, match="y: off by"):
        assert_exact({"y": truth.float() * float("nan")}, {"y": truth})
