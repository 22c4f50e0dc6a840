"""Runs a program in eager and compiled, and compares everything that a user can see.

What a user sees: outputs, gradients of parameters and inputs, buffers, and the Python attributes of every module.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import register_backend
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable
from torch.utils import _pytree as pytree

import scatter_moe  # noqa: F401  registers the backend
from tests.numerics import TOLERANCE, assert_exact

# Attributes which nn.Module itself keeps; hooks are compared by their number.
# torch.compile itself leaves _is_torch_compile behind.
MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {"_is_torch_compile"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

graphs: list[torch.fx.GraphModule] = []


@register_backend(name="counting_aot_eager")
def counting_aot_eager(gm, example_inputs):
    """aot_eager which keeps the graphs that it was given."""
    graphs.append(gm)
    return lookup_backend("aot_eager")(gm, example_inputs)


@register_backend(name="counting_eager")
def counting_eager(gm, _example_inputs):
    """Runs the graph as it is and keeps it."""
    graphs.append(gm)
    return gm.forward


def fresh_dynamo():
    """Forget all compiled code, counted graphs and counters."""
    torch._dynamo.reset()
    counters.clear()
    graphs.clear()


def compile_ours(target, inner="counting_aot_eager", options=None, **kwargs):
    return torch.compile(target, backend="scatter_moe", options={"inner_backend": inner, **(options or {})}, **kwargs)


def rewritten() -> int:
    return counters["scatter_moe"]["rewritten"]


def can_be_cached(gm: torch.fx.GraphModule) -> bool:
    """Whether AOTAutograd's cache takes a graph."""
    try:
        check_cacheable(gm)
    except BypassAOTAutogradCache:
        return False
    return True


@dataclass
class Seen:
    """All that one run of a program shows."""

    outputs: list[Any]
    grads: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    state: dict[str, Any]


def observe(call: Callable, module: nn.Module, *args, seed=0, backward=True, grad_dtype=None, **kwargs) -> Seen:
    """Call, send random gradients back through every differentiable output, and look at everything.

    grad_dtype is the dtype in which the gradients are drawn, if it isn't that of the outputs.
    """
    module.zero_grad(set_to_none=True)
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for leaf in inputs:
        leaf.grad = None
    random.seed(seed)
    torch.manual_seed(seed)
    outputs = pytree.tree_leaves(call(*args, **kwargs))
    if backward:
        send_back(outputs, seed, grad_dtype)
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    grads |= {f"input {i}": leaf.grad for i, leaf in enumerate(inputs) if leaf.requires_grad}
    detached = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in outputs]
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    return Seen(
        detached, {n: None if g is None else g.clone() for n, g in grads.items()}, buffers, python_state(module)
    )


def send_back(outputs, seed, grad_dtype):
    """Backward with unit-scale random gradients, the same for the same seed."""
    differentiable = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = [
        torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(grad_dtype or leaf.dtype)
        for leaf in differentiable
    ]
    upstream = [grad.to(leaf) for grad, leaf in zip(drawn, differentiable, strict=True)]
    if differentiable:
        torch.autograd.backward(differentiable, upstream)


def python_state(module: nn.Module) -> dict[str, Any]:
    """Every attribute that a user could have set, by module path, and the number of hooks."""
    state = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name not in MODULE_INTERNALS:
                state[f"{path}.{name}"] = comparable(value)
        for name in HOOKS:
            state[f"{path}.{name}"] = len(getattr(child, name))
        state[f"{path}.training"] = child.training
        state[f"{path}.class"] = type(child).__name__
    return state


def comparable(value):
    """Plain data as it is (tensors copied), anything else by its type."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool | None | torch.dtype | torch.device):
        return value
    return type(value)


def assert_same(actual: Seen, expected: Seen, computed_in: torch.dtype | None = None):
    """Equal up to rounding; an absent gradient counts as zeros. computed_in: None if in each tensor's own dtype."""
    assert len(actual.outputs) == len(expected.outputs)
    for i, (ours, eager) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        assert_equal_value(ours, eager, f"output {i}", computed_in)
    assert actual.grads.keys() == expected.grads.keys()
    for name, eager in expected.grads.items():
        assert_close_grad(actual.grads[name], eager, f"gradient of {name}")
    assert_equal_value(actual.buffers, expected.buffers, "buffers")
    assert_equal_value(actual.state, expected.state, "python state")


def assert_close_grad(ours, eager, what):
    if ours is None and eager is None:
        return
    ours = torch.zeros_like(eager) if ours is None else ours
    eager = torch.zeros_like(ours) if eager is None else eager
    assert_close(ours, eager, what)


def assert_equal_value(ours, eager, what, computed_in: torch.dtype | None = None):
    """Tensors by the numerical rule, everything else exactly."""
    if isinstance(eager, torch.Tensor):
        assert isinstance(ours, torch.Tensor), f"{what}: {ours} instead of a tensor"
        assert_close(ours, eager, what, computed_in)
    elif isinstance(eager, dict):
        assert ours.keys() == eager.keys(), f"{what}: {sorted(ours.keys() ^ eager.keys())} on one side only"
        for key, value in eager.items():
            assert_equal_value(ours[key], value, f"{what}: {key}", computed_in)
    elif isinstance(eager, list):
        assert len(ours) == len(eager), f"{what}: {len(ours)} entries, eager has {len(eager)}"
        for i, value in enumerate(eager):
            assert_equal_value(ours[i], value, f"{what}[{i}]", computed_in)
    else:
        assert ours == eager, f"{what}: {ours}, eager has {eager}"


def assert_close(ours: torch.Tensor, eager: torch.Tensor, what: str, computed_in: torch.dtype | None = None):
    """The numerical rule for floating point, equality for the rest; shape, dtype and device always."""
    assert (ours.shape, ours.dtype, ours.device) == (eager.shape, eager.dtype, eager.device), what
    if eager.dtype in TOLERANCE:
        assert_exact({what: ours}, {what: eager}, computed_in or eager.dtype)
    elif eager.is_floating_point():
        torch.testing.assert_close(ours, eager, msg=what)
    else:
        assert torch.equal(ours, eager), what
