"""A weight that is a tensor subclass, as quantised weights are: what is stored is not what is multiplied."""

import torch
from torch.utils import _pytree as pytree


class ScaledWeight(torch.Tensor):
    """Wraps a tensor; every operator sees scale times it."""

    @staticmethod
    def __new__(cls, inner, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner, scale):
        self.inner, self.scale = inner, scale

    def __tensor_flatten__(self):
        return ["inner"], self.scale

    @staticmethod
    def __tensor_unflatten__(tensors, scale, outer_size, outer_stride):
        return ScaledWeight(tensors["inner"], scale)

    def __repr__(self):
        return f"ScaledWeight({self.inner}, {self.scale})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return ScaledWeight(func(args[0].inner), args[0].scale)
        if func is torch.ops.aten.normal_.default:
            func(args[0].inner, *args[1:], **(kwargs or {}))
            return args[0]

        def unwrap(value):
            return value.inner * value.scale if isinstance(value, ScaledWeight) else value

        args, kwargs = pytree.tree_map(unwrap, (args, kwargs or {}))
        return func(*args, **kwargs)
