"""A prepared launch passes to Triton's C function what its launcher would pass: without a GPU, which is never asked."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from triton.backends.nvidia import driver
from triton.runtime import driver as active_driver
from triton.tools.tensor_descriptor import TensorDescriptor

from scatter_ops.cuda.prepared import prepared_launch

GRID, STREAM, FUNCTION, METADATA = (4, 2, 1), 99, 7, (8, 1, 1024)
OPTIONS = ("launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature")
SCRATCH = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
DESCRIPTOR = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 64], "fp4_padded": False}


@pytest.fixture
def encoded() -> Iterator[mock.Mock]:
    """In place of the driver's function that encodes a descriptor."""
    fill = mock.Mock(return_value="encoded")
    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    with mock.patch.object(active_driver, "_active", SimpleNamespace(utils=utils)):
        yield fill


def compiled(c_function: Any, with_descriptor: bool) -> Any:
    """A kernel of a pointer, a descriptor maybe, a constant and a number, with a launcher that wasn't compiled."""
    types = ["*bf16", *["tensordesc<bf16[16, 64]>"] * with_descriptor, "constexpr", "i32"]
    signature, described = dict(enumerate(types)), [DESCRIPTOR] * with_descriptor
    launcher = object.__new__(driver.CudaLauncher)
    launcher.__dict__.update(dict.fromkeys((*OPTIONS, *SCRATCH), 0), num_ctas=1)
    launcher.launch = driver.wrap_handle_tensordesc(c_function, signature, described)
    return SimpleNamespace(
        run=launcher,
        src=SimpleNamespace(signature=signature),
        metadata=SimpleNamespace(tensordesc_meta=described),
        function=FUNCTION,
        packed_metadata=METADATA,
    )


@pytest.mark.parametrize("with_descriptor", [False, True])
def test_the_same_is_passed(with_descriptor: bool, encoded: mock.Mock):
    c_function = mock.Mock()
    kernel = compiled(c_function, with_descriptor)
    descriptors = [TensorDescriptor.from_tensor(torch.empty(32, 64, dtype=torch.bfloat16), [16, 64])] * with_descriptor
    args = [4096, *descriptors, "constant", 5]
    kernel.run(*GRID, STREAM, FUNCTION, METADATA, None, None, None, *args)
    function, prepared = prepared_launch(kernel, GRID, STREAM, args)
    assert function is c_function
    assert c_function.call_count == 1
    function(*prepared)
    assert c_function.call_args_list[1] == c_function.call_args_list[0]
    assert encoded.call_count == 2 * with_descriptor  # not by the last call


def test_unknown_launchers_are_asked_themselves():
    launches = mock.MagicMock(run="another kind")
    function, args = prepared_launch(launches, GRID, STREAM, [4096])
    function(*args)
    launches[GRID].assert_called_once_with(4096, stream=STREAM)
