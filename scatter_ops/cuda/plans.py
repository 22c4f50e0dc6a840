"""Launches of an earlier call made again for calls like it: where the host is slower than the device.

A call whose signature (shapes, strides, dtypes, alignments, options) was met before is recorded as it runs: the
compiled kernels, their grids, and which tensor's address each argument is. Calls like it allocate the same workspaces,
in one piece, and launch the same kernels. Nothing that is decided depends on a tensor's values.

A call whose recording isn't complete has no plan and is always made as usual. So is one of large workspaces, which take
turns in memory there. PyTorch gives the same memory out again and again: the arguments that belong to a call's
addresses are kept too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from scatter_ops.cuda.prepared import prepared_launch
from scatter_ops.cuda.recording import Recording

MAX_SIGNATURES = 1024
ALIGNMENT = 16  # bytes: what kernels are compiled for, and what descriptors ask for
WORKSPACE_ALIGNMENT = 512
MAX_BOUND = 256  # sets of addresses of a plan
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
MAX_WORKSPACE_BYTES = 2**27  # more keeps the device busy for longer than the host


class Place(NamedTuple):
    """An address: so far into a tensor, by its number among the inputs, the results and the workspace."""

    tensor: int
    offset: int


class Address(NamedTuple):
    """In place of the tensor that a descriptor describes: its address is all that a launch asks for."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class Launch(NamedTuple):
    """args: what is passed, with the positions of addresses and of descriptors, whose addresses are a call's own."""

    compiled: Any
    grid: tuple[int, ...]
    args: list[Any]
    pointers: list[tuple[int, Place]]
    descriptors: list[tuple[int, Place]]


class Call(NamedTuple):
    """What decides which launches are made, and the tensors they are made on."""

    signature: tuple[Any, ...]
    tensors: list[Tensor]
    addresses: list[int]


class Plan:
    """bound: by the stream and the addresses of inputs, results and workspace, what each launch calls and with what."""

    def __init__(self, launches: list[Launch], results: list[tuple[torch.Size, torch.dtype]], workspace_bytes: int):
        self.launches, self.results, self.workspace_bytes = launches, results, workspace_bytes
        self.bound: dict[tuple[int, ...], list[tuple[Callable[..., None], Sequence[Any]]]] = {}

    def run(self, call: Call) -> tuple[Tensor, ...]:
        device = call.tensors[0].device
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results]
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        stream = driver.active.get_current_stream(device.index)  # pyright: ignore[reportAttributeAccessIssue]
        addresses = *call.addresses, *[result.data_ptr() for result in results], workspace.data_ptr()
        bound = self.bound.get((stream, *addresses)) or self._bind(stream, addresses)
        for run, args in bound:
            run(*args)
        return tuple(results)

    def _bind(self, stream: int, addresses: tuple[int, ...]) -> list[tuple[Callable[..., None], Sequence[Any]]]:
        if len(self.bound) >= MAX_BOUND:
            self.bound.clear()
        bound = []
        for compiled, grid, template, pointers, descriptors in self.launches:
            args = template.copy()
            for i, (tensor, offset) in pointers:
                args[i] = addresses[tensor] + offset
            for i, (tensor, offset) in descriptors:
                args[i] = _described_at(args[i], Address(addresses[tensor] + offset))
            bound.append(prepared_launch(compiled, grid, stream, args))
        self.bound[stream, *addresses] = bound
        return bound


class Planned:
    """A function of tensors, a tensor first, lists of them and options that returns new tensors.

    A signature is recorded when it is met for the second time: one that never comes again should cost nothing.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._plans: dict[Any, Plan | None] = {}
        self._met = set()

    def again(self, *args: Any) -> tuple[Tensor, ...] | None:
        """The results of a call that has a plan; None, and nothing done, if it has none."""
        call = _call(args)
        return call and self._run(call)

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        call = _call(args)
        if call is None:
            return self._function(*args)
        results = self._run(call)
        if results is not None:
            return results
        signature = call.signature
        if signature in self._plans:
            return self._function(*args)
        for known in (self._plans, self._met):
            if len(known) >= MAX_SIGNATURES:
                known.clear()
        if signature not in self._met:
            self._met.add(signature)
            return self._function(*args)
        with Recording() as recording:
            results = self._function(*args)
        self._plans[signature] = _plan(recording, call, results)
        return results

    def _run(self, call: Call) -> tuple[Tensor, ...] | None:
        plan = self._plans.get(call.signature)
        if plan is None or call.tensors[0].get_device() != torch.cuda.current_device():
            return None
        if knobs.runtime.launch_enter_hook.calls:  # a profiler's, which a prepared launch doesn't call
            return None
        return plan.run(call)


def _call(args: Sequence[Any]) -> Call | None:
    """None of a call with several tensors in a list, whose distances decide how they are read, or with a subclass."""
    tensors: list[Tensor] = []
    signature: list[Any] = [torch.get_float32_matmul_precision()]
    for arg in args:
        if type(arg) is list:
            if len(arg) > 1:
                return None
            tensors += arg
            signature.append(len(arg))
        elif isinstance(arg, Tensor):
            tensors.append(arg)
            signature.append(Tensor)
        else:
            signature += type(arg), arg
    addresses = []
    for tensor in tensors:
        if type(tensor) not in PLAIN_TYPES:
            return None
        address = tensor.data_ptr()
        addresses.append(address)
        signature += tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), address % ALIGNMENT
    return Call(tuple(signature), tensors, addresses)


def _described_at(descriptor: Any, base: Any) -> Any:
    """A copy of what passed the checks of a new one."""
    copy = object.__new__(type(descriptor))
    copy.__dict__.update(descriptor.__dict__, base=base)
    return copy


def _plan(recording: Recording, call: Call, results: tuple[Tensor, ...]) -> Plan | None:
    """None where a call can't be made again from its inputs' addresses alone."""
    allocated = {tensor.data_ptr(): tensor for tensor in recording.allocated}
    tensors = (*call.tensors, *results)
    places = {tensor.data_ptr(): Place(i, 0) for i, tensor in enumerate(tensors)}
    # Of two tensors at one address nobody could say which an argument is; empty ones have none.
    distinct = len({tensor.data_ptr() for tensor in tensors if tensor.numel()}) == sum(1 for t in tensors if t.numel())
    made_here = all(
        result.data_ptr() in allocated and allocated[result.data_ptr()].shape == result.shape for result in results
    )
    if not recording.complete or not distinct or not made_here:
        return None
    workspaces, size = [], 0
    for start, tensor in allocated.items():
        if start not in places:
            workspaces.append((start, tensor.nbytes, size))
            size += -(-tensor.nbytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT

    def place(tensor: Tensor) -> Place | None:
        address = tensor.data_ptr()
        within = [offset + address - start for start, extent, offset in workspaces if 0 <= address - start < extent]
        return places.get(address) or (Place(len(tensors), within[0]) if within else None)

    if size > MAX_WORKSPACE_BYTES:
        return None
    launches = []
    for made in recording.launches:
        pointers = [(i, place(arg)) for i, arg in enumerate(made.args) if isinstance(arg, Tensor)]
        descriptors = [(i, place(arg.base)) for i, arg in enumerate(made.args) if hasattr(arg, "block_shape")]
        if made.compiled is None or any(found is None for _, found in pointers + descriptors):
            return None
        numbers = [None if isinstance(arg, Tensor) else arg for arg in made.args]
        for i, _ in descriptors:
            numbers[i] = _described_at(numbers[i], None)
        launches.append(Launch(made.compiled, made.grid, numbers, pointers, descriptors))
    return Plan(launches, [(result.shape, result.dtype) for result in results], size)
