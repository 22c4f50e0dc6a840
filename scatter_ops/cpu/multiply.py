"""One product of an expert's rows with its matrix on the CPU, by the call that takes the least time.

In half precision PyTorch multiplies as fast as in fp32, or faster, where oneDNN has kernels for the CPU. Elsewhere a
product of many rows takes five to a hundred times as long as in fp32, and copies of rows and matrix in fp32 take a
fraction of that. Such a product is as exact: PyTorch's own is summed in fp32, too, and rounded once.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

HALF_PRECISION = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
FEW_ROWS = 3  # a copy of the matrix takes about as long as so many rows
Multiply = Callable[[Tensor | None, Tensor, Tensor, float, Tensor], None]
"""multiply(addend, rows, matrix, scale, out): out = scale rows @ matrix, and the addend, which may be out itself."""


def multiplier(dtype: torch.dtype) -> Multiply:
    """How to multiply in this dtype; for matrices one after the other, of which it keeps a copy."""
    return Widened() if multiplies_slowly(dtype) else multiply


def multiply(addend: Tensor | None, rows: Tensor, matrix: Tensor, scale: float, out: Tensor) -> None:
    if addend is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(addend, rows, matrix, alpha=scale, out=out)


class Widened:
    """Products of several rows in fp32, all with their matrix in the memory of one copy; those of few as they are."""

    def __init__(self) -> None:
        self._matrix = torch.empty(0)

    def __call__(self, addend: Tensor | None, rows: Tensor, matrix: Tensor, scale: float, out: Tensor) -> None:
        if addend is not None:
            out.copy_(torch.addmm(addend.float(), rows.float(), self._copy(matrix), alpha=scale))
        elif rows.shape[0] > FEW_ROWS:
            out.copy_(torch.mm(rows.float(), self._copy(matrix)))
        elif matrix.stride(0) == 1:
            torch.mm(rows, matrix, out=out)
        else:
            for row, out_row in zip(rows.unbind(0), out.unbind(0), strict=True):
                torch.mv(matrix.t(), row, out=out_row)

    def _copy(self, matrix: Tensor) -> Tensor:
        if self._matrix.shape != matrix.shape or self._matrix.stride() != matrix.stride():
            self._matrix = torch.empty_like(matrix, dtype=torch.float32)
        return self._matrix.copy_(matrix)


@functools.cache
def multiplies_slowly(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products in this half precision have no kernels of oneDNN on this CPU."""
    if dtype not in HALF_PRECISION:
        return False
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, HALF_PRECISION[dtype], None)
    return not (supported and supported())
