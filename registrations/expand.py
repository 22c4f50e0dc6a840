"""scatter_moe::expand: each expert's parameter repeated for its grouped rows."""

from collections.abc import Sequence

from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels, like_parameter
from scatter_ops import checks

define("expand(Tensor[] param, Tensor offsets, SymInt num_rows) -> Tensor")
kernels("expand", checks.expand)


@fake("expand", checks.expand)
def expand_fake(param: Sequence[Tensor], offsets: Tensor, num_rows: int) -> Tensor:
    rest = param[0].shape[1:] if len(param) == 1 else param[0].shape
    return param[0].new_empty(num_rows, *rest)


def setup_context(ctx, output, param, offsets, num_rows) -> None:
    ctx.is_list = len(param) > 1
    ctx.save_for_backward(offsets)


def backward(ctx, grad: Tensor):
    (offsets,) = ctx.saved_tensors
    return (like_parameter(OPS.expand_backward(grad, offsets), ctx.is_list),)


autograd("expand", setup_context, backward)
