"""Calls of the operators from within this package that pass PyTorch's dispatcher by.

From Python into the dispatcher and back takes as long as ten small calls of PyTorch. Where all that it would do is to
call the kernel, the CPU's is called at once, and the CUDA kernel's launches are made if they are planned.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAX_SIGNATURES = 1024
SCALARS = {str, bool, int, float, torch.dtype, type(None)}
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
USUAL_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView)
UNUSUAL_KEYS = ~USUAL_KEYS.raw_repr()


def nobody_watches() -> bool:
    """Whether no dispatch mode, no function transform and no tracer is active: they add keys to the usual ones."""
    return not torch._C._dispatch_tls_local_include_set().raw_repr() & UNUSUAL_KEYS


def below_autograd(op: Callable, on_cpu: Callable, check: Callable[..., None], plans: Any = None) -> Callable:
    """The operator without its derivative: where it is nobody else's business by its CPU function or, if a call like it
    had been made, by `plans` (scatter_ops.cuda.plans.Planned); else by dispatch.
    """
    check_once = once_per_signature(check, are_plain)

    def call(*args, unwatched=False):
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        with torch._C._AutoDispatchBelowAutograd():
            unwatched = unwatched or nobody_watches()
            if unwatched and _is_on_cpu(args[0]) and check_once(*args):
                return on_cpu(*args)
            if unwatched and plans is not None and args[0].is_cuda:
                results = plans.again(*args)
                if results is not None:
                    return results
            return op(*args)

    return call


def _refuse_tangents(op: Callable, args: Sequence[Any]) -> None:
    """Below autograd nothing is known of forward mode: derivatives would be lost."""
    tensors = [tensor for value in args for tensor in (value if isinstance(value, list) else (value,))]
    if any(isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op} has no forward-mode derivative: got a tensor with a tangent, accepted are those without"
        )


def once_per_signature(
    check: Callable[..., None], concerns: Callable[[Sequence[Any]], bool] = lambda args: True
) -> Callable[..., bool]:
    """The same check, which looks at nothing but metadata, left out for arguments like earlier ones that passed.

    Returns whether the arguments are of those that the check concerns; nothing is checked otherwise.
    """
    passed = set()

    def check_once(*args) -> bool:
        signature = _signature(args)
        if signature in passed:
            return True
        if not concerns(args):
            return False
        check(*args)
        if len(passed) >= MAX_SIGNATURES:
            passed.clear()
        passed.add(signature)
        return True

    return check_once


def are_plain(values: Sequence[Any]) -> bool:
    """Whether all tensors, those in lists too, are ordinary ones of the CPU."""
    return all(
        are_plain(value) if isinstance(value, list) else not isinstance(value, Tensor) or _is_plain(value)
        for value in values
    )


def _is_on_cpu(first: Any) -> bool:
    """Whether the first argument is: nothing else is looked at."""
    tensor = first[0] if isinstance(first, list) and first else first
    return isinstance(tensor, Tensor) and tensor.is_cpu


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN_TYPES and tensor.device.type == "cpu" and tensor.layout == torch.strided


def _signature(values: Sequence[Any]) -> tuple:
    """Of each tensor, those in lists too, what a check may look at; anything else as it is."""
    signature = []
    for value in values:
        if type(value) in SCALARS:
            signature.append(value)
        elif isinstance(value, list):
            signature.append(_signature(value))
        else:
            signature += type(value), value.shape, value.dtype, value.device, value.layout
    return tuple(signature)
