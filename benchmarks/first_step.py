"""One measurement of `benchmarks.compile_time`: the first training step of a compiled model, in a process of its own.

CPU seconds are those of the process and of the compilers that it starts. Guard time is that of one call whose guards
hold, in CPU time of its thread.
"""

import resource
import statistics
import time

import torch
from torch import Tensor, nn
from torch._dynamo import utils

import scatter_moe
from benchmarks.compile_models import REWRITTEN, make

GUARD_CALLS = 50


def measure(inner: str, kind: str, num_experts: int, num_layers: int) -> dict[str, float]:
    """Seconds of the first training step, Inductor's share of them, and milliseconds of the guards."""
    torch.manual_seed(0)
    model, x = make(kind, num_experts, num_layers)
    compiled = torch.compile(model, backend="scatter_moe", options={"inner_backend": inner}, fullgraph=True)
    compiled_first = torch.compile(nn.Linear(2, 2), backend=inner, dynamic=True)
    compiled_first(torch.ones(3, 2)).sum().backward()  # PyTorch's own imports
    start, start_cpu, start_inductor = time.perf_counter(), cpu_seconds(), inductor_seconds()
    if kind == "one buffer":
        scatter_moe.stack_experts(model)
    compiled(x).sum().backward()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
    expected = num_layers if kind in REWRITTEN else 0
    rewritten = utils.counters["scatter_moe"]["rewritten"]
    if rewritten != expected:
        raise RuntimeError(f"{kind}: {rewritten} layers were rewritten, not {expected}")
    share = (inductor_seconds() - start_inductor) / seconds
    return {"cpu_seconds": cpu, "seconds": seconds, "inductor_share": share, "guard_ms": guard_ms(model, x)}


def inductor_seconds() -> float:
    """Elapsed time in Inductor so far."""
    return utils.calculate_time_spent().get("inductor_compile", 0.0)


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def guard_ms(model: nn.Module, x: Tensor) -> float:
    code = type(model).forward.__code__
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
    values, times = dict(zip(code.co_varnames, (model, x), strict=False)), []
    for _ in range(GUARD_CALLS):
        start = time.thread_time()
        holds = entry.guard_manager.check(values)
        times.append(1e3 * (time.thread_time() - start))
        if not holds:
            raise RuntimeError("the guards do not hold on the inputs that they were made for")
    return statistics.median(times)
