"""scatter_moe::expand: each expert's parameter repeated for its grouped rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels, like_parameter
from scatter_ops import checks

define("expand(Tensor[] param, Tensor offsets, SymInt num_rows, ScalarType? out_dtype=None) -> Tensor")
kernels("expand", checks.expand)


@fake("expand", checks.expand)
def expand_fake(
    param: Sequence[Tensor], offsets: Tensor, num_rows: int, out_dtype: torch.dtype | None = None
) -> Tensor:
    rest = param[0].shape[1:] if len(param) == 1 else param[0].shape
    return param[0].new_empty(num_rows, *rest, dtype=out_dtype or param[0].dtype)


def setup_context(ctx, output, param, offsets, num_rows, out_dtype=None) -> None:
    ctx.is_list, ctx.dtype = len(param) > 1, param[0].dtype
    ctx.save_for_backward(offsets)


def backward(ctx, grad: Tensor):
    (offsets,) = ctx.saved_tensors
    return (like_parameter(OPS.expand_backward(grad, offsets).to(ctx.dtype), ctx.is_list),)


autograd("expand", setup_context, backward)
