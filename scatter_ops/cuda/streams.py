"""A second stream, for work that leaves most of the device idle."""

import contextlib
import functools
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def aside(after: torch.cuda.Event) -> Iterator[None]:
    """Launches within wait for `after` alone, and the current stream waits for them at the end.

    It is capturable in a CUDA graph. Memory should be allocated outside: it belongs to the stream that is current then.
    """
    current = torch.cuda.current_stream()
    second = _second_stream(current.device_index, current.cuda_stream)
    second.wait_event(after)
    try:
        with torch.cuda.stream(second):
            yield
    finally:
        current.wait_stream(second)


@functools.cache
def _second_stream(device_index: int, stream: int) -> torch.cuda.Stream:
    """One for each: a stream that a capture has forked to is no one else's until the capture has joined it."""
    return torch.cuda.Stream(device_index)
