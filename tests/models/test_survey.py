"""The survey tells a difference from rounding that the model itself amplifies."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.backend.harness import Seen, observe
from tests.models.equality import MoreSteps, compare, differing, reorder_sums

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
SLIGHTLY, OFF = 1e-6, 1e-3


def seen(output: torch.Tensor) -> Seen:
    return Seen([output], {"weight": None}, {}, {})


def in_float32(error: float) -> Seen:
    return seen((EXACT + error).float())


def more(
    ours: Seen, eager: Seen | None = None, stock: Seen | None = None, reordered: tuple[Seen, ...] = ()
) -> MoreSteps:
    """Float64 runs that are exact unless given."""
    return MoreSteps(lambda: reordered, lambda: eager or seen(EXACT), lambda: ours, lambda: stock or seen(EXACT))


def in_float64(error: float) -> MoreSteps:
    return more(seen(EXACT + error))


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


def test_eager_is_off_with_another_order_of_sums():
    runs = in_float32(-SLIGHTLY), in_float32(-OFF)
    assert compare(in_float32(OFF), in_float32(0.0), more(seen(EXACT), reordered=runs)) == "float32, float64"
    with pytest.raises(AssertionError, match="output 0"):
        compare(in_float32(OFF), in_float32(0.0), more(seen(EXACT), reordered=runs[:1]))
    with pytest.raises(AssertionError, match="output 0"):
        compare(in_float32(OFF), in_float32(0.0), more(seen(EXACT + SLIGHTLY), reordered=runs))


def test_stock_is_off_in_float64_too():
    ours = seen(EXACT + SLIGHTLY)
    assert compare(in_float32(OFF), in_float32(-OFF), more(ours, stock=ours)) == "float32, float64 of torch.compile"
    with pytest.raises(AssertionError, match="output 0"):
        compare(in_float32(OFF), in_float32(-OFF), more(ours, stock=seen(EXACT - SLIGHTLY)))


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 64), nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm((self.up(x) @ self.down)[None], self.down[None])


def test_another_order_of_sums_rounds_otherwise():
    torch.manual_seed(0)
    products, x = Products(), torch.randn(8, 256)
    plain = observe(products, products, x)
    reorder_sums([products], seed=0)
    reordered = observe(products, products, x)
    assert not differing(reordered, plain)
    assert not torch.equal(reordered.outputs[0], plain.outputs[0])


def test_rounding_of_zero_is_not_compared():
    ours, eager, wide, wide_too = (seen(size * EXACT) for size in (1e-8, -1e-8, 1e-16, -1e-16))
    for run in (ours, eager):
        run.outputs[0] = run.outputs[0].float()
    assert compare(ours, eager, more(wide, wide_too)) == "float32, float64"
    with pytest.raises(AssertionError, match="output 0"):
        compare(ours, eager, more(seen(1e-8 * EXACT), wide_too, wide_too))


def test_another_dtype():
    with pytest.raises(AssertionError):
        compare(seen(EXACT), in_float32(0.0), in_float64(0.0))
