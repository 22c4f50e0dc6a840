"""Keeps the routing of a low-precision run, for a run in another precision to send its tokens to the same experts."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CHOICES = (torch.ops.aten.topk.default, torch.ops.aten.max.dim)
ARGMAX = torch.ops.aten.argmax.default


class RecordChoices(TorchDispatchMode):
    """Notes the indices of every topk, max and argmax."""

    def __init__(self):
        super().__init__()
        self.choices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in CHOICES:
            self.choices.append(out[1].clone())
        if func is ARGMAX:
            self.choices.append(out.clone())
        return out


class ReplayChoices(TorchDispatchMode):
    """Answers every topk, max and argmax with the indices noted, and the values found there."""

    def __init__(self, choices):
        super().__init__()
        self.choices = list(choices)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is ARGMAX:
            return self.choices.pop(0)
        if func not in CHOICES:
            return out
        indices = self.choices.pop(0)
        dim = args[2] if func is CHOICES[0] and len(args) > 2 else args[1] if func is CHOICES[1] else -1
        if indices.ndim < args[0].ndim:
            return args[0].gather(dim, indices.unsqueeze(dim)).squeeze(dim), indices
        return args[0].gather(dim, indices), indices


class FloatMeansDouble(TorchFunctionMode):
    """Turns every request for float32 into one for float64: routers ask for it by name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wider = {torch.float32: torch.float64}
        args, kwargs = pytree.tree_map(
            lambda value: wider.get(value, value) if isinstance(value, torch.dtype) else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)
