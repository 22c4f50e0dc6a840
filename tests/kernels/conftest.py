"""Triton's interpreter for the kernels, whatever else the session has imported; the precision of float32."""

import os
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import scatter_ops

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

RELOADED = ("scatter_ops.kernels", "scatter_ops.cuda", "triton")


@pytest.fixture(params=["highest", "high"])
def precision(request) -> Iterator[str]:
    """Of float32 products: PyTorch's setting while a test runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def interpreted() -> ModuleType:
    """A second copy of scatter_ops.cuda whose kernels are interpreted on the CPU.

    Triton decides between compiling and interpreting while modules are imported, its own library included: so both are
    imported afresh with TRITON_INTERPRET=1, beside the copies that other tests use. bfloat16 products are wrong there.
    """
    before = _take_modules()
    package = getattr(scatter_ops, "cuda", None)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import scatter_ops.cuda as copy
    finally:
        del os.environ["TRITON_INTERPRET"]
        _take_modules()
        sys.modules.update(before)
        if package is None:
            del scatter_ops.cuda
        else:
            scatter_ops.cuda = package
    return copy


def _take_modules() -> dict[str, ModuleType]:
    """Remove the modules that exist once for each mode; Triton's compiled library serves both."""
    names = [name for name in sys.modules if name.startswith(RELOADED) and not name.startswith("triton._C")]
    return {name: sys.modules.pop(name) for name in names}
