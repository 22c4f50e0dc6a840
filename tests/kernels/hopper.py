"""Where tests of Hopper's kernels run, and how they see that these were launched."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch


def require_hopper(launcher: ModuleType) -> None:
    """Other GPUs, and a Triton whose Gluon is another one, have the portable kernels alone: nothing to compare."""
    if torch.cuda.get_device_capability() != (9, 0) or launcher.hopper is None:
        pytest.skip("needs Hopper, and the Gluon that its kernels are written in")


@contextlib.contextmanager
def spied(module: Any, name: str) -> Iterator[list[Any]]:
    """What a function returns, call by call."""
    function, returned = getattr(module, name), []
    with mock.patch.object(module, name, lambda *args: returned.append(function(*args)) or returned[-1]):
        yield returned
