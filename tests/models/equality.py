"""Whether a training step under our backend equals eager's, in models that amplify rounding themselves.

Outputs and every gradient are compared by the rule for float32. Some models make more of the rounding of their experts
than that rule allows: there float32 tells nothing, and float64, which rounds 5e8 times finer, has to be equal.

Such a tensor is one of which a float32 run of eager is further from its float64 run than the rule allows. One run may
be near the truth by luck, so there are more, which add up the terms of their experts' products in other orders.

Where torch.compile alone gives other results in float64 than eager, ours are compared with those.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.backend.harness import Seen, assert_equal_value
from tests.numerics import assert_exact

NOISE = 1e-6  # float64's rounding is 2e-9 of float32's
OTHER_ORDERS = 8
PRODUCTS = frozenset((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm))


@dataclass(frozen=True)
class MoreSteps:
    """The same training step in other ways, for where float32 is not enough.

    `reordered` are eager's in float32, each with another order of sums in its experts; the others are in float64.
    """

    reordered: Callable[[], Iterable[Seen]]
    eager: Callable[[], Seen]
    ours: Callable[[], Seen]
    stock: Callable[[], Seen]


def compare(ours: Seen, eager: Seen, more: MoreSteps) -> str:
    """What it took to see that `ours` equals `eager`; raises AssertionError where it doesn't."""
    assert_equal_value(ours.buffers, eager.buffers, "buffers")
    assert [like(output) for output in ours.outputs] == [like(output) for output in eager.outputs]
    differences = differing(ours, eager)
    if not differences:
        return "float32"
    exact, ours_exact = more.eager(), more.ours()
    noise = {name for name in _named(exact) if all(is_noise(eager, run, name) for run in (exact, ours_exact))}
    in_doubt = {name: difference for name, difference in differences.items() if name not in noise}
    for run in chain([eager], more.reordered()):
        if not in_doubt:
            break
        amplified = differing(run, exact)
        in_doubt = {name: difference for name, difference in in_doubt.items() if name not in amplified}
    _raise_first(in_doubt)
    off = {name: difference for name, difference in differing(ours_exact, exact).items() if name not in noise}
    if not off:
        return "float32, float64"
    off_from_stock = differing(ours_exact, more.stock())
    _raise_first({name: off_from_stock[name] for name in off if name in off_from_stock})
    return "float32, float64 of torch.compile"


def _raise_first(differences: dict[str, AssertionError]) -> None:
    for difference in differences.values():
        raise difference


def reorder_sums(modules: Iterable[nn.Module], seed: int) -> None:
    """Makes the products in the modules' forward passes add up their terms in an order drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        module.forward = partial(_in_another_order, generator, module.forward)


def _in_another_order(generator: torch.Generator, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with InAnotherOrder(generator):
        return forward(*args, **kwargs)


class InAnotherOrder(TorchFunctionMode):
    """Shuffles what products sum over: the columns of x in x @ w, and those of w, over which the gradient of x sums."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        if func in PRODUCTS and not kwargs and args[1].dim() > 1:
            return self.product(*args)
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = self.product(input, weight.t())
        return product if bias is None else product + bias

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        rows, columns = (torch.randperm(size, generator=self.generator) for size in w.shape[-2:])
        return (x[..., rows] @ w[..., rows, :][..., columns])[..., columns.argsort()]


def is_noise(in_float32: Seen, in_float64: Seen, name: str) -> bool:
    """Whether a tensor is zero but for rounding (the gradient of a key's bias): it shrinks with the precision."""
    narrow, wide = (_named(run)[name] for run in (in_float32, in_float64))
    return narrow is not None and wide is not None and bool(wide.abs().max() <= NOISE * narrow.abs().max())


def differing(given: Seen, expected: Seen) -> dict[str, AssertionError]:
    """The outputs and gradients that are not equal by the rule for the wider of both dtypes."""
    found, results = {}, _named(given)
    for name, tensor in _named(expected).items():
        try:
            assert_exact({name: results[name]}, {name: tensor}, torch.float32 if tensor is None else tensor.dtype)
        except AssertionError as difference:
            found[name] = difference
    return found


def like(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _named(seen: Seen) -> dict[str, Tensor | None]:
    return {f"output {number}": output for number, output in enumerate(seen.outputs)} | seen.grads
