"""Kernels compile for each supported GPU family, without one, within its shared memory and without spilling in bulk."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from benchmarks import offline
from scatter_ops import cuda, tuning

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0)]
T, K, E, D, F = 64, 2, 8, 256, 512
PRODUCTS = {"glu_forward_kernel", "glu_backward_kernel", "grouped_gemm_kernel", "weight_grad_kernel"}
MAX_SPILL_BYTES = 256  # of a thread's stack: more than a few registers of an epilogue would mean a wrong tile


def training_step(
    dtype: torch.dtype,
    listed: bool = False,
    layout: str = "concatenated",
    expert_width: int = F,
    transposed: bool = False,
    model_width: int = D,
) -> None:
    """One forward and backward with every kind of kernel in it; tensors that nobody reads."""
    D = model_width

    def weight(num_out: int, num_in: int) -> list[torch.Tensor]:
        sizes = (num_in, num_out) if transposed else (num_out, num_in)
        if not listed:
            return [empty(E, *sizes)]
        memory = empty(3 * E, *sizes)
        return [memory[3 * e + e % 3] for e in range(E)]  # not equally spaced, nor too far apart for one descriptor

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype)

    order, offsets = cuda.route(torch.empty(T, K, dtype=torch.int64), E)
    options = ("silu", layout, transposed, "output", 1.702, 7.0, None)
    separate, width = layout == "separate", expert_width
    gate_up, up = weight(width if separate or layout == "plain" else 2 * width, D), weight(width, D) if separate else []
    arguments = (empty(T, D), torch.empty(T, K), order, offsets, gate_up, up, weight(D, width), [], [], [])
    _, h, _ = cuda.mlp_forward(*arguments, *options, True, False)
    needs = [True, True, True, separate, True, False, False, False]
    cuda.mlp_backward(empty(T, D), h, None, *arguments, *options, needs)


@pytest.mark.parametrize(
    ("capability", "dtype", "rows_per_expert"),
    [
        *((capability, torch.bfloat16, 4096) for capability in CAPABILITIES),
        ((8, 6), torch.bfloat16, 64),
        ((8, 6), torch.float32, 4096),
        ((9, 0), torch.bfloat16, 8),
    ],
    ids=str,
)
def test_kernels_fit(capability: tuple[int, int], dtype: torch.dtype, rows_per_expert: int):
    """Many rows for each expert take the largest tiles, few the deepest ones."""
    with offline.recorded(capability, rows_per_expert) as launches:
        training_step(dtype)
    limit = 1024 * tuning.SHARED_MEMORY_KIB[capability]
    for launch in launches:
        found = offline.resources(offline.compile_launch(launch))
        name = launch.kernel.__name__
        assert found.shared <= limit, f"{name}: {found}"
        assert found.stack <= MAX_SPILL_BYTES, f"{name}: {found}"


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_fits_hopper(precision: str, transposed: bool):
    """TF32 is for tensor cores: Hopper's instructions, or the older ones where the reduction isn't contiguous."""
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.float32, transposed=transposed)
    for launch in launches:
        found = offline.resources(offline.compile_launch(launch))
        name = launch.kernel.__name__
        assert found.shared <= 1024 * tuning.SHARED_MEMORY_KIB[9, 0], f"{name}: {found}"
        assert found.stack <= MAX_SPILL_BYTES, f"{name}: {found}"
        assert (found.wgmma + found.mma > 0) == (precision == "high" and name in PRODUCTS), f"{name}: {found}"


@pytest.mark.parametrize(("layout", "transposed"), [("concatenated", False), ("interleaved", True), ("plain", False)])
@pytest.mark.parametrize(("capability", "rows_per_expert"), [((8, 0), 4096), ((8, 0), 8), ((9, 0), 8)], ids=str)
def test_rows_that_are_aligned_are_copied_16_bytes_at_a_time(capability, rows_per_expert, layout, transposed):
    """Multiples of 8 columns are as good as those of 16, which are all that Triton knows of by itself."""
    copies = []
    for model_width, expert_width in ((272, 336), (264, 328)):
        with offline.recorded(capability, rows_per_expert) as launches:
            training_step(torch.bfloat16, False, layout, expert_width, transposed, model_width)
        products = [launch for launch in launches if launch.kernel.__name__ in PRODUCTS]
        copies.append([offline.resources(offline.compile_launch(launch)).async_copies for launch in products])
    assert copies[0] == copies[1]
    assert min(copies[1]) > 0


@pytest.mark.parametrize(("capability", "kind"), [((8, 0), "list"), ((9, 0), "tma")], ids=str)
def test_lists_of_weights_are_read_asynchronously(capability: tuple[int, int], kind: str):
    """Through pointers, and by one TMA descriptor where there is TMA."""
    with offline.recorded(capability, rows_per_expert=4096) as launches:
        training_step(torch.bfloat16, listed=True)
    products = [launch for launch in launches if launch.kernel.__name__ in PRODUCTS - {"weight_grad_kernel"}]
    assert len(products) == 4
    for launch in products:
        assert launch.kwargs.get("WEIGHT", "tma") == kind  # Hopper's kernels know but one way
        found = offline.resources(offline.compile_launch(launch))
        copies = found.tma if kind == "tma" else found.async_copies
        assert copies > 0, f"{launch.kernel.__name__}: {found}"


def test_products_use_the_tensor_cores_of_hopper():
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.bfloat16)
    found = {launch.kernel.__name__: launch for launch in launches if launch.kernel.__name__ in PRODUCTS}
    assert found.keys() == PRODUCTS
    for name, launch in found.items():
        resources = offline.resources(offline.compile_launch(launch))
        assert resources.wgmma > 0, f"{name}: {resources}"
        assert resources.tma > 0, f"{name}: {resources}"


@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
def test_hopper_takes_its_own_kernel_for_the_gradient_of_the_activation(layout: str):
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.float16, layout=layout)
    launch = next(launch for launch in launches if launch.kernel.__name__ == "glu_backward_kernel")
    assert launch.kernel.is_gluon()
    found = offline.resources(offline.compile_launch(launch))
    assert found.stack == 0, found


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
def test_hopper_takes_its_own_kernels_wherever_the_weights_lie(layout: str, listed: bool, transposed: bool):
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.bfloat16, listed, layout, transposed=transposed)
    kernels = [launch.kernel for launch in launches if launch.kernel.__name__ in PRODUCTS - {"weight_grad_kernel"}]
    assert [kernel.is_gluon() for kernel in kernels] == [True] * 4


@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_hopper_copies_no_rows(layout: str):
    """Its kernels gather them; those of widths that it has no kernel for read copies. A width needs not be a tile's."""
    for width, copies in ((F, 0), (F - 8, 0), (100, 1)):
        with offline.recorded((9, 0), rows_per_expert=4096) as launches:
            training_step(torch.bfloat16, layout=layout, expert_width=width)
        assert any(launch.kernel.__name__ == "dispatch_kernel" for launch in launches) == copies, width


@pytest.mark.parametrize("name", ["weight_grad_kernel", "grouped_gemm_kernel"])
def test_hopper_takes_its_own_kernel_where_stores_can_wait(name: str):
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.bfloat16)
    found = [launch for launch in launches if launch.kernel.__name__ == name]
    assert [launch.kernel.is_gluon() for launch in found] == [True, True]
    resources = offline.resources(offline.compile_launch(found[0]))
    assert resources.stack == 0, resources
    assert resources.shared <= 1024 * tuning.SHARED_MEMORY_KIB[9, 0], resources


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_hopper_keeps_its_kernel_for_the_activation_in_registers(layout: str):
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.bfloat16, layout=layout)
    launch = next(launch for launch in launches if launch.kernel.__name__ == "glu_forward_kernel")
    found = offline.resources(offline.compile_launch(launch))
    assert found.stack == 0, found
    assert found.shared <= 1024 * tuning.SHARED_MEMORY_KIB[9, 0], found


@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
@pytest.mark.parametrize("expert_width", [4, 98, 99, 100])
def test_hopper_takes_any_width(expert_width: int, layout: str):
    """TMA wants strides of 16 bytes: where it can't store, launchers find another way."""
    with offline.recorded((9, 0), rows_per_expert=4096) as launches:
        training_step(torch.bfloat16, layout=layout, expert_width=expert_width)
    stores = [launch.kwargs["OUT_TMA"] for launch in launches if "SCALE_INPUT" in launch.kwargs]
    assert stores == [False, False]
