"""Launches of compiled kernels that are prepared once: Triton's launcher asks anew each time for what never changes."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

try:
    from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
except ImportError:  # a Triton that has other names for them makes its launches itself
    CudaLauncher = wrap_handle_tensordesc = None


def prepared_launch(
    compiled: Any, grid: tuple[int, ...], stream: int, args: Sequence[Any]
) -> tuple[Callable[..., None], Sequence[Any]]:
    """Triton's C function and all that its launcher would pass to it: TMA descriptors are encoded here, once."""
    launcher = getattr(compiled, "run", None)
    c_function = _c_function(launcher)
    if c_function is None:
        return functools.partial(compiled[grid], stream=stream), args
    passed: list[Any] = []
    recorder = copy.copy(launcher)
    recorder.launch = wrap_handle_tensordesc(
        lambda *args: passed.extend(args), compiled.src.signature, compiled.metadata.tensordesc_meta
    )
    no_hooks = None, None, None
    recorder(*grid, stream, compiled.function, compiled.packed_metadata, *no_hooks, *args)
    return c_function, passed


def _c_function(launcher: Any) -> Callable[..., None] | None:
    """None unless the launcher is one as we know it, which needs no memory of its own for a launch."""
    if CudaLauncher is None or type(launcher) is not CudaLauncher:
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if not inspect.isfunction(launcher.launch):
        return launcher.launch
    return inspect.getclosurevars(launcher.launch).nonlocals.get("launcher")
