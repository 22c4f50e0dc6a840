"""`module.to(...)` where every tensor is as it is to be: nothing happens.

PyTorch before 2.13 breaks the graph there. Whether nothing happens is asked in Python that Dynamo traces, which guards
all that the answer depends on.
"""

from typing import Any

import torch
from torch import nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import UserFunctionVariable


def to(
    capture: Any, tx: Any, fn: VariableTracker, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """The module itself, or None where Dynamo is to trace what happens."""
    module = getattr(fn, "obj", None)
    if module is None:
        return None
    event = capture.event(tx, "module.to()")
    event.helps = True
    if capture.is_denied(event):
        return None
    answer = UserFunctionVariable(changes_nothing).call_function(tx, [module, *args], kwargs)
    return module if answer.as_python_constant() else None


def changes_nothing(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether `module.to(*args, **kwargs)` leaves every tensor the object that it is, with the data that it has."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    future = torch.__future__
    if memory_format is not None or (dtype is not None and not dtype.is_floating_point):
        return False
    if future._overwrite_module_params_on_conversion or future._swap_module_params_on_conversion:
        return False
    if any(type(part)._apply is not nn.Module._apply or "_apply" in part.__dict__ for part in module.modules()):
        return False
    parameters, buffers = list(module.parameters()), list(module.buffers())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return all(_is_so(tensor, device, dtype) for tensor in (*parameters, *gradients, *buffers))


def _is_so(tensor: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether `tensor`, no subclass, has that device and, if it is to have it, that dtype."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or device not in (None, tensor.device):
        return False
    return dtype in (None, tensor.dtype) or not (tensor.is_floating_point() or tensor.is_complex())
