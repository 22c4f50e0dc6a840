"""Median time and peak memory of a function, on the CPU or on a CUDA device."""

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(function: Callable[[], object], repeats: int = 20, warmup: int = 5) -> float:
    """Median milliseconds of one call, measured by CUDA events where there is a CUDA device."""
    for _ in range(warmup):
        function()
    return statistics.median(_ms(function) for _ in range(repeats))


def queued_ms(function: Callable[[], object], calls: int = 10) -> float:
    """Milliseconds of one call among several that are queued without waiting, as in training: the host runs ahead."""
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        function()  # keeps the device busy while the host gets ahead
    return _ms(lambda: [function() for _ in range(calls)]) / calls


def graph_ms(function: Callable[[], object], repeats: int = 20, warmup: int = 5) -> float:
    """Median milliseconds of one call within a replayed CUDA graph of several: what the GPU alone takes."""
    for _ in range(warmup):
        function()
    calls, graph = 10, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return median_ms(graph.replay, repeats, warmup) / calls


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call, until the device has finished."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib(function: Callable[[], object]) -> float | None:
    """Peak GiB allocated on the CUDA device during one call; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def _ms(function: Callable[[], object]) -> float:
    """Milliseconds of one call, measured by CUDA events where there is a CUDA device."""
    if not torch.cuda.is_available():
        return 1e3 * seconds(function)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
