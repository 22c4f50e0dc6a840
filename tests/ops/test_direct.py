"""Calls that pass the dispatcher by: whoever could watch one sees it all the same."""

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from registrations.direct import are_plain, nobody_watches
from tests.ops.cases import OPS, SILU, Case
from tests.ops.test_autograd import Recorder

ARGUMENTS = Case("mlp", options=SILU).arguments(dtype=torch.float32)


class Wrapped(torch.Tensor):
    """Passes every operator on to the tensor that it wraps, and notes its name."""

    calls: list[str] = []

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func.__name__)
        unwrapped = tree_map_only(cls, lambda t: t.tensor, (args, kwargs or {}))
        return return_and_correct_aliasing(func, args, kwargs or {}, func(*unwrapped[0], **unwrapped[1]))


def test_modes_and_transforms_are_noticed():
    assert nobody_watches()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert nobody_watches()
    with Recorder():
        assert not nobody_watches()
    seen = []
    torch.func.grad(lambda x: seen.append(nobody_watches()) or x)(torch.ones(()))
    torch.jit.trace(lambda x: seen.append(nobody_watches()) or x, torch.ones(2), check_trace=False)
    assert seen == [False, False]


@pytest.mark.parametrize("place", ["x", "weight"])
def test_a_subclass_sees_the_call_after_an_ordinary_one(place):
    arguments = [[t.detach() for t in a] if isinstance(a, list) else a for a in ARGUMENTS]
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = OPS.mlp(*arguments)
    if place == "x":
        arguments[0] = Wrapped(arguments[0])
    else:
        arguments[4] = [Wrapped(arguments[4][0])]
    Wrapped.calls.clear()
    torch.testing.assert_close(OPS.mlp(*arguments), expected, rtol=0, atol=0)
    assert "mlp_forward.default" in Wrapped.calls


def test_what_is_plain():
    ones = torch.ones(2, 2)
    assert are_plain([ones, [torch.nn.Parameter(ones)], "silu", 1])
    assert not are_plain([[ones.to("meta")]])
    assert not are_plain([ones.to_sparse()])
    assert not are_plain([[ones], [Wrapped(ones)]])
