"""What launchers ask of the device: capability, multiprocessors, float32 precision, being the current one."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from scatter_ops import reference

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; Ampere's for the CPU, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision of a dot: float32 follows torch's setting, other dtypes have but one."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: make it that of the first tensor among the arguments."""

    @functools.wraps(function)
    def on_device(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _first_tensor(args).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return on_device


def float64_by_reference(function: Callable[P, R]) -> Callable[P, R]:
    """float64 is for gradient checks, not for tensor cores: the specification serves it.

    Keyword arguments are about kernels alone, and not for the specification.
    """

    @functools.wraps(function)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
            return getattr(reference, function.__name__)(*args)
        return function(*args, **kwargs)

    return dispatch


def _first_tensor(args: Sequence[object]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise TypeError("expected a tensor among the positional arguments")
