"""Experts whose tensors lie in one buffer a name, where a user asked for it.

A compiled graph has an input and guards for each tensor that it reads, and both cost time: at the first compile, and
in each call. Where the tensors of all experts lie in one buffer, the graph reads that: one input, and one guard on the
whole list, which looks whether anything was written to the experts since (`fx_passes.modules.watch`).

    stack(experts)                      the tensors of alike experts become parts of buffers and stay the user's objects
    stack_of(experts)                   what was stacked, if it still is as it was made
    stacked(experts, path, recorded)    the buffer of one name, as autograd may read it

A buffer's gradient is divided among its parameters outside of the graph, where autograd accumulates each as usual:
hooks, DistributedDataParallel and `torch.autograd.grad` see nothing else. The tensors share one version counter with
their buffer, so that autograd notices a write to one of them between forward and backward.

What belongs to a list is remembered here and not in the list: copies, pickles and checkpoints know nothing of it.
"""

import logging
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fx_passes.modules.likeness import Path, are_alike, tensor_at, tensors_in
from fx_passes.modules.watch import Watch

log = logging.getLogger("scatter_moe")


class ExpertStack:
    """The tensors of a list of experts by their place in an expert, each in the order of the experts.

    `kind` is what a graph that reads the buffers depends on.
    """

    def __init__(self, container: nn.ModuleList) -> None:
        """Of alike experts whose tensors lie in one buffer a name."""
        self.experts = tuple(container)
        self._tensors = {
            path: tuple(tensor_at(expert, path) for expert in self.experts) for path, _ in tensors_in(self.experts[0])
        }
        self._watch, self._holds = Watch(container), True
        self.kind = self._kind()

    def holds(self, container: nn.ModuleList) -> bool:
        """Whether the experts of the list are these, still alike, and their tensors where they were put."""
        if not self._watch.shows_no_change():
            held = self._holds
            self._verify(container)
            if held and not self._holds:
                log.warning(
                    "a write to %d stacked experts took them apart: compiled code has an input for each of their "
                    "parameters again, until scatter_moe.stack_experts stacks them anew",
                    len(self.experts),
                )
        return self._holds

    def buffer(self, path: Path) -> Tensor:
        """All tensors at `path`, without gradient: no view for autograd, but of their version counter."""
        first = self._tensors[path][0].detach()
        sizes, strides = (len(self.experts), *first.shape), (first.numel(), *first.stride())
        return first.as_strided(sizes, strides).detach()

    def differentiable(self, path: Path) -> Tensor:
        """The same as a function of the parameters."""
        return _Stacked.apply(self, path, *self._tensors[path])

    def example(self, path: Path) -> Tensor:
        """A leaf of autograd of the same kind. Dynamo takes a parameter's sizes and its place as fixed."""
        return nn.Parameter(self.buffer(path), self._tensors[path][0].requires_grad)

    def _verify(self, container: nn.ModuleList) -> None:
        """The watch comes first, to miss no write, and is kept last: another thread may ask meanwhile."""
        watch = Watch(container)
        self._holds, self.kind = self._is_as_made(container), self._kind()
        self._watch = watch

    def _kind(self) -> tuple[Any, ...]:
        firsts = ((path, tensors[0]) for path, tensors in self._tensors.items())
        kinds = ((path, first.shape, first.dtype, first.device, first.requires_grad) for path, first in firsts)
        return len(self.experts), *kinds

    def _is_as_made(self, container: nn.ModuleList) -> bool:
        if tuple(container) != self.experts or not are_alike(self.experts):
            return False
        places = [path for path, _ in tensors_in(self.experts[0])]
        return places == list(self._tensors) and all(map(self._lie_in_one_buffer, places))

    def _lie_in_one_buffer(self, path: Path) -> bool:
        tensors = self._tensors[path]
        first, storage = tensors[0], tensors[0].untyped_storage().data_ptr()
        are_own = all(tensor_at(expert, path) is own for expert, own in zip(self.experts, tensors, strict=True))
        are_in_order = all(
            own.data_ptr() == first.data_ptr() + place * first.nbytes for place, own in enumerate(tensors)
        )
        share = all(own.untyped_storage().data_ptr() == storage for own in tensors)
        return are_own and are_in_order and share and first.is_contiguous()


class _Stacked(torch.autograd.Function):
    """A buffer as a function of the parameters that are parts of it."""

    @staticmethod
    def forward(ctx: Any, stack: ExpertStack, path: Path, *_parameters: Tensor) -> Tensor:
        return stack.buffer(path)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *grads[0].unbind(0)


_stacks: WeakKeyDictionary[nn.ModuleList, ExpertStack] = WeakKeyDictionary()


def stack_of(container: nn.Module) -> ExpertStack | None:
    """What was stacked of this list, if it still is as it was made."""
    stack = _stacks.get(container) if isinstance(container, nn.ModuleList) else None
    return stack if stack is not None and stack.holds(container) else None


@torch.compiler.disable
def stacked(container: nn.ModuleList, path: Path, recorded: bool) -> Tensor:
    """What compiled code gives its graph: it calls this once its guards hold. Dynamo would compile this, too.

    Args:
        recorded: whether the graph reads it where grad mode is on, be it on or off where the graph begins.
    """
    stack = _stacks[container]
    if not recorded:
        return stack.buffer(path)
    with torch.enable_grad():
        return stack.differentiable(path)


def stack(container: nn.ModuleList) -> None:
    """Moves the tensors of the experts, for which `why_not` gives no reason, into one buffer a name.

    Raises:
        RuntimeError: a tensor is in use.
    """
    experts = tuple(container)
    for path, _ in tensors_in(experts[0]):
        _move([tensor_at(expert, path) for expert in experts])
    _stacks[container] = ExpertStack(container)


def why_not(container: nn.ModuleList) -> str | None:
    """What keeps experts from being stacked; None where nothing does."""
    experts = tuple(container)
    if len(experts) < 2:
        return f"got {len(experts)} experts, accepted are two and more"
    if not are_alike(experts):
        return "the experts differ in more than the values of their parameters, or share some"
    tensors = [tensor for expert in experts for _, tensor in tensors_in(expert)]
    if not tensors:
        return "the experts have no parameters"
    if not all(tensor.is_contiguous() and not tensor.is_meta for tensor in tensors):
        return "a parameter is not contiguous, or on the meta device"
    if any(tensor._backward_hooks or tensor._post_accumulate_grad_hooks for tensor in tensors):
        return "a parameter has hooks: stack first, then register them"
    if any(map(weakref.getweakrefcount, tensors)):
        return "something holds a weak reference to a parameter"
    return None


@torch.inference_mode(False)
def _move(tensors: list[Tensor]) -> None:
    """Into one buffer, with which they then share memory and the version counter.

    `tensor.data = part` would keep a counter of its own.
    """
    buffer = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, buffer.unbind(0), strict=True):
        moved = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part.detach()
        moved.grad = tensor.grad
        try:
            torch.utils.swap_tensors(tensor, moved)
        except RuntimeError as error:
            raise RuntimeError(
                "a parameter is in use, by a graph whose backward has not run or by a wrapper of the model such as "
                "DistributedDataParallel: stack the experts before"
            ) from error
