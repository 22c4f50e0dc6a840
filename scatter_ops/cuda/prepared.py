"""Launches of compiled kernels that are prepared once: Triton's launcher asks anew each time for what never changes."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

try:
    from triton.backends.nvidia import driver
except ImportError:  # a Triton without NVIDIA's backend
    driver = None


def prepared_launch(
    compiled: Any, grid: tuple[int, ...], stream: int, args: Sequence[Any]
) -> tuple[Callable[..., None], Sequence[Any]]:
    """Triton's C function and all that its launcher would pass to it: TMA descriptors are encoded here, once.

    Where the launcher isn't one as we know it, or needs memory of its own for a launch, the launcher itself.
    """
    launcher = compiled.run
    known = driver is not None and type(launcher) is getattr(driver, "CudaLauncher", None)
    c_function = _c_function(launcher) if known else None
    if driver is None or c_function is None or launcher.global_scratch_size or launcher.profile_scratch_size:
        return functools.partial(compiled[grid], stream=stream), args
    passed: list[Any] = []
    recorder = copy.copy(launcher)
    recorder.launch = driver.wrap_handle_tensordesc(
        lambda *args: passed.extend(args), compiled.src.signature, compiled.metadata.tensordesc_meta
    )
    no_hooks = None, None, None
    recorder(*grid, stream, compiled.function, compiled.packed_metadata, *no_hooks, *args)
    return c_function, passed


def _c_function(launcher: Any) -> Callable[..., None] | None:
    """Behind the Python function that opens descriptors, if there are any."""
    launch = launcher.launch
    return inspect.getclosurevars(launch).nonlocals.get("launcher") if inspect.isfunction(launch) else launch
