"""What a call allocates and launches, recorded as it runs.

Only what `launch` launches is recorded: a call that does anything else on the device, or reads any other tensor, isn't
`complete`, nor is one that says that more is `decided_by_addresses`.
"""

import threading
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class Recorded(NamedTuple):
    """A launch with all that was passed."""

    compiled: Any
    grid: tuple[int, ...]
    args: list[Any]


class Recording(TorchDispatchMode):
    """`current` in the thread that makes the call."""

    current = threading.local()

    def __init__(self) -> None:
        super().__init__()
        self.complete = True
        self.allocated: list[Tensor] = []
        self.launches: list[Recorded] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view:
            self.complete = False
        return result

    def __enter__(self):
        self.current.recording = self
        return super().__enter__()

    def __exit__(self, *exception):
        self.current.recording = None
        return super().__exit__(*exception)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), recorded if the call is that makes it."""
    compiled = kernel[grid](*args, **constants)
    recording = getattr(Recording.current, "recording", None)
    if recording is not None:
        bound = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
        recording.launches.append(Recorded(compiled, (*grid, 1, 1)[:3], bound))


def decided_by_addresses() -> None:
    """The call that is being made depends on where its tensors lie: no call like it is known to be the same."""
    recording = getattr(Recording.current, "recording", None)
    if recording is not None:
        recording.complete = False
