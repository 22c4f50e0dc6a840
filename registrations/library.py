"""The operator library `scatter_moe` and the few verbs with which each operator's file registers its parts.

Kernels check their arguments and call the function of the operator's name in `scatter_ops.cpu` or `scatter_ops.cuda`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from registrations.direct import below_autograd, nobody_watches, once_per_signature
from scatter_ops import cpu

NAMESPACE = "scatter_moe"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS = getattr(torch.ops, NAMESPACE)
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
BELOW_AUTOGRAD: dict[str, Callable] = {}  # the operators without and with their derivatives, as Python functions
WITH_AUTOGRAD: dict[str, Callable] = {}


def define(schema: str) -> None:
    LIBRARY.define(schema)


def kernels(
    name: str,
    check: Callable[..., None],
    on_cpu: Callable | None = None,
    on_cuda: Callable | None = None,
    planned: bool = False,
) -> None:
    """Register the implementations behind the argument check, by default the functions of the operator's name.

    planned: on CUDA a call's launches are made again for calls like it, see scatter_ops.cuda.plans.
    """
    cpu_function: Callable = on_cpu or getattr(cpu, name)
    check_once = once_per_signature(check)

    def checked(function: Callable) -> Callable:
        def kernel(*args):
            check_once(*args)
            return function(*args)

        return kernel

    LIBRARY.impl(name, checked(cpu_function), "CPU")
    cuda_kernel = checked(on_cuda or _on_cuda(name))
    plans = _Plans(cuda_kernel) if planned else None
    LIBRARY.impl(name, plans or cuda_kernel, "CUDA")
    BELOW_AUTOGRAD[name] = below_autograd(getattr(OPS, name).default, cpu_function, check, plans)


def call(name: str, *args) -> Any:
    """The operator, with its derivative; where nobody watches, without a way through the dispatcher to it."""
    if not nobody_watches():
        return getattr(OPS, name).default(*args)
    if torch.is_grad_enabled():
        return WITH_AUTOGRAD[name](*args, inside=True)
    return BELOW_AUTOGRAD[name](*args, unwatched=True)


def fake(name: str, check: Callable[..., None]) -> Callable[[Callable], Callable]:
    """Decorator: register what the operator returns while tracing, behind the argument check."""

    def register(function: Callable) -> Callable:
        def fake_kernel(*args):
            check(*args)
            return function(*args)

        torch.library.register_fake(f"{NAMESPACE}::{name}", fake_kernel, lib=LIBRARY)
        return function

    return register


def autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Sequence[Any]]) -> None:
    """Register the derivative of an operator whose arguments may be tensor lists.

    setup_context(ctx, output, *arguments) saves what backward needs; backward(ctx, *grads) returns the gradients of the
    leading arguments, a list of gradients for a tensor list. ctx.inside: whether `call` calls, whose callers alone have
    the outputs that they don't pass on.
    """
    below = BELOW_AUTOGRAD[name]

    class Derivative(torch.autograd.Function):
        """Sees the tensors that require a gradient alone, by their places among all arguments with lists opened."""

        @staticmethod
        def forward(ctx, arguments, places, inside, *differentiable):
            output, ctx.inside = below(*arguments, unwatched=inside), inside
            setup_context(ctx, output, *arguments)
            ctx.places = places
            return output

        @staticmethod
        def backward(ctx, *grads):
            flat = _flatten(backward(ctx, *grads))
            return None, None, None, *[flat[i] for i in ctx.places]

    def kernel(*arguments, inside=False):
        if torch.is_grad_enabled():
            flat = _flatten(arguments)
            places = [i for i, value in enumerate(flat) if isinstance(value, Tensor) and value.requires_grad]
            if places:
                return Derivative.apply(arguments, places, inside, *[flat[i] for i in places])
        return below(*arguments, unwatched=inside)

    LIBRARY.impl(name, kernel, "Autograd")
    WITH_AUTOGRAD[name] = kernel


def not_differentiable(name: str, sentence: str) -> None:
    """Make differentiating through the operator an error that says `sentence`."""

    def backward(ctx, *grads):
        raise RuntimeError(sentence)

    autograd(name, lambda ctx, output, *arguments: None, backward)


def autocast(name: str) -> Callable[[Callable], Callable]:
    """Decorator of cast(to_autocast_dtype, *args) -> args, which is applied before the operator under autocast."""

    def register(cast: Callable[..., tuple]) -> Callable:
        for device_type, key in AUTOCAST_KEYS.items():
            LIBRARY.impl(name, _autocast_kernel(name, device_type, cast), key)
        return cast

    return register


def flops(name: str) -> Callable[[Callable], Callable]:
    """Decorator of formula(*shapes and arguments, out_shape) -> number of floating-point operations."""

    def register(formula: Callable) -> Callable:
        register_flop_formula(getattr(OPS, name))(formula)
        return formula  # not PyTorch's wrapper, so that one formula can serve several operators

    return register


def requires_grad(value: Tensor | Sequence[Tensor]) -> bool:
    """Whether a tensor or any of a list requires a gradient."""
    return value.requires_grad if isinstance(value, Tensor) else any(tensor.requires_grad for tensor in value)


def like_parameter(stacked_grad: Tensor, is_list: bool) -> list[Tensor]:
    """A stacked gradient as gradients of the parameter list: one stacked tensor or one tensor per expert."""
    return list(stacked_grad.unbind(0)) if is_list else [stacked_grad]


def _on_cuda(name: str) -> Callable:
    def function(*args):
        from scatter_ops import cuda  # Triton is needed only once there is something to run on a GPU

        return getattr(cuda, name)(*args)

    return function


class _Plans:
    """scatter_ops.cuda.plans.Planned of a kernel, made at the first call: Triton is needed only then."""

    def __init__(self, kernel: Callable) -> None:
        self._kernel = kernel

    @functools.cached_property
    def _planned(self) -> Any:
        from scatter_ops.cuda.plans import Planned

        return Planned(self._kernel)

    def __call__(self, *args) -> Any:
        return self._planned(*args)

    def again(self, *args) -> Any:
        return self._planned.again(*args)


def _autocast_kernel(name: str, device_type: str, cast: Callable[..., tuple]) -> Callable:
    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)

        def to_autocast_dtype(value: Tensor | Sequence[Tensor]):
            """As F.linear: floating-point tensors are cast, float64 is left alone."""
            if not isinstance(value, Tensor):
                return [to_autocast_dtype(tensor) for tensor in value]
            return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value

        with torch.autocast(device_type, enabled=False):
            return getattr(OPS, name)(*cast(to_autocast_dtype, *args))

    return kernel


def _flatten(values: Sequence[Any]) -> list[Any]:
    """Open the lists, into which autograd functions do not look."""
    return [entry for value in values for entry in (value if isinstance(value, list) else (value,))]
