"""Compile the kernels that launchers would launch, for a GPU that needn't be there.

`recorded` runs launchers on CPU tensors (their values aren't touched) and records each launch instead of making it;
`compile_launch` compiles one. The result is cached on disk as usual, so a later run on a GPU finds it.
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from scatter_ops import tuning
from scatter_ops.cuda import operands

_shape_class = tuning.shape_class
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    capability: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiler reports: registers, bytes of stack (spills) and of shared memory, instructions in the PTX."""

    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    async_copies: int
    tma: int


@contextlib.contextmanager
def recorded(capability: tuple[int, int], rows_per_expert: int | None = None) -> Iterator[list[Launch]]:
    """rows_per_expert: choose configs for that many, so that the tensors may be small."""
    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs, capability))

    def shape_class(num_rows, num_experts, n, k):
        return _shape_class(rows_per_expert or num_rows, 1 if rows_per_expert else num_experts, n, k)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(operands, "capability", lambda device: capability),
        mock.patch.object(tuning, "shape_class", shape_class),
    ):
        yield launches


def compile_launch(launch: Launch) -> Any:
    source, options = _source(launch)
    return triton.compile(source, target=_target(launch), options=options)


def compile_in_parallel(launches: Iterable[Launch]) -> int:
    """Compile the kernels of all launches, each once, on all cores, and return how many they are."""
    distinct = list({_key(launch): launch for launch in launches}.values())
    _in_parallel[:] = distinct  # processes that are forked find them there: a launch can't be sent to one
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(_compile_number, range(len(distinct))))
    return len(distinct)


_in_parallel: list[Launch] = []


def _compile_number(number: int) -> None:
    compile_launch(_in_parallel[number])


def _key(launch: Launch) -> tuple[str, str]:
    source, options = _source(launch)
    return source.hash(), repr(sorted(options.items()))


def _target(launch: Launch) -> GPUTarget:
    major, minor = launch.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles, and with which options."""
    backend = make_backend(_target(launch))
    kernel, kwargs = launch.kernel, {**launch.kwargs, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return source, options.__dict__


def resources(compiled: Any) -> Resources:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Resources(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        async_copies=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
    )
