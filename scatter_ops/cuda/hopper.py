"""Launches of Hopper's kernels, which stand in for the portable ones where they can.

Gluon is experimental: with a Triton that has another one, importing this fails and the portable kernel does it all.
"""

from typing import Any

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from scatter_ops.cuda.glu import Glu
from scatter_ops.cuda.integers import cdiv
from scatter_ops.cuda.operands import Routing, Rows, grid_size, tma_can_read, weight_descriptor
from scatter_ops.cuda.parameters import ExpertBias, ExpertWeight
from scatter_ops.cuda.recording import launch
from scatter_ops.cuda.routing import Schedule
from scatter_ops.kernels.hopper import BLOCK_K, BLOCK_M, BLOCK_N, BOX, QUARTER, UNIT
from scatter_ops.kernels.hopper_glu_backward import PART, glu_backward_kernel
from scatter_ops.kernels.hopper_glu_forward import H_PART, glu_forward_kernel
from scatter_ops.kernels.hopper_grouped_gemm import grouped_gemm_kernel
from scatter_ops.kernels.hopper_weight_grad import weight_grad_kernel
from scatter_ops.tuning import Config

STAGES = 3  # of glu_forward and grouped_gemm, whose finished tile takes the room of another


def launch_glu_forward(
    config: Config, rows: Rows, weight: ExpertWeight, glu: Glu, tiles: Schedule, a_NF: Tensor, h: Tensor
) -> bool:
    """False where only the portable kernel can do it: nothing is launched then. TMA can reach the results."""
    operands = _operands(config, rows, weight, STAGES)
    if operands is None or glu.on_input or glu.gate_bias.kind != "none" or glu.up_bias.kind != "none":
        return False
    f_size = a_NF.shape[1]
    part = H_PART.value // 2 if glu.layout == "interleaved" else H_PART.value
    grid = grid_size(config, tiles.max_row_tiles * cdiv(f_size, glu.f_size(BLOCK_N.value)), a_NF.device)
    launch(
        glu_forward_kernel,
        grid,
        *operands,
        _gluon(create_ragged_descriptor(a_NF, [BLOCK_M.value, part])),
        _gluon(glu.tiles_of_h(h, BLOCK_M.value, part)) if h.numel() else None,
        h,
        glu.routing.order_N,
        glu.routing.offsets_E,
        tiles.tile_map,
        weight.addresses.distances if weight.addresses else None,
        weight.experts_per_way or None,
        glu.alpha,
        glu.limit,
        glu.routing.num_slots,
        glu.routing.num_experts,
        f_size,
        weight.n * weight.ways,
        weight.k,
        *_gathered(rows, weight.k, BLOCK_K.value),
        X_DIVISOR=rows.divisor or None,
        ACTIVATION=glu.activation,
        LAYOUT=glu.h_layout,
        N_MAJOR=weight.stride_k != 1,
        STAGES=STAGES,
        GROUP_M=config.group_m,
        num_warps=8,
    )
    return True


def launch_glu_backward(
    config: Config,
    grad: Rows,
    h_NH: Tensor,
    down: ExpertWeight,
    glu: Glu,
    tiles: Schedule,
    grad_h: Tensor | None,
    scaled_a: Tensor | None,
    partials: Tensor | None,
) -> bool:
    """False where only the portable kernel can do it: nothing is launched then. TMA can reach h and the results."""
    operands = _operands(config, grad, down, config.num_stages)
    if operands is None or glu.on_input or grad_h is partials is None:
        return False
    block_m, part = BLOCK_M.value, PART.value
    grid = grid_size(config, tiles.max_row_tiles * cdiv(down.n, BLOCK_N.value), h_NH.device)
    glu_backward_kernel[grid](  # pyright: ignore[reportIndexIssue]
        *operands,
        _gluon(_parts_of_h(h_NH, glu, block_m, part)),
        None if grad_h is None else _gluon(glu.tiles_of_h(grad_h, block_m, part)),
        None if scaled_a is None else _gluon(create_ragged_descriptor(scaled_a, [block_m, part])),
        glu.topk_weights,
        partials,
        glu.routing.order_N,
        tiles.tile_map,
        down.addresses.distances if down.addresses else None,
        glu.alpha,
        glu.limit,
        down.n,
        down.k,
        0 if partials is None else partials.shape[1],
        *_gathered(grad, down.k, BLOCK_K.value),
        GRAD_DIVISOR=grad.divisor or None,
        ACTIVATION=glu.activation,
        LAYOUT=glu.h_layout,
        N_MAJOR=down.stride_k != 1,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=8,
    )
    return True


def launch_grouped_gemm(
    config: Config,
    rows: Rows,
    weight: ExpertWeight,
    bias: ExpertBias,
    routing: Routing,
    tiles: Schedule,
    out: Tensor,
    num_zeroed: int,
) -> bool:
    """False where only the portable kernel can do it: nothing is launched then. TMA can reach the result.

    num_zeroed: rows before this one that are sentinels' become zeros.
    """
    operands = _operands(config, rows, weight, STAGES, k_ways=weight.ways)
    if operands is None or bias.kind != "none":
        return False
    grid = grid_size(config, tiles.max_row_tiles * cdiv(weight.n, BLOCK_N.value), out.device)
    launch(
        grouped_gemm_kernel,
        grid,
        *operands,
        _gluon(create_ragged_descriptor(out, [BLOCK_M.value, QUARTER.value])),
        out,
        routing.order_N,
        routing.offsets_E,
        tiles.tile_map,
        weight.addresses.distances if weight.addresses else None,
        weight.experts_per_way or None,
        num_zeroed,
        routing.num_experts,
        weight.n,
        weight.k,
        *_gathered(rows, weight.k, BLOCK_K.value),
        X_DIVISOR=rows.divisor or None,
        K_WAYS=weight.ways,
        N_MAJOR=weight.stride_k != 1,
        STAGES=STAGES,
        GROUP_M=config.group_m,
        num_warps=8,
    )
    return True


def _operands(
    config: Config, rows: Rows, weight: ExpertWeight, num_stages: int, k_ways: int = 1
) -> tuple[Any, Any] | None:
    """Both of a product, as the kernels read them; None where only the portable kernels can."""
    block_m, block_n, block_k = BLOCK_M.value, BLOCK_N.value, BLOCK_K.value
    if not config.overlap or (config.block_m, config.block_n, config.block_k) != (block_m, block_n, block_k):
        return None
    w = weight_descriptor(weight, BOX.value, block_k, n_ways=1)
    if w is None or k_ways * cdiv(weight.k, block_k) < num_stages or not tma_can_read(rows.data):
        return None
    if rows.divisor:
        return (rows.data, _gluon(w)) if k_ways == 1 and _in_units(weight.k) else None
    if k_ways == 1:
        return _gluon(create_ragged_descriptor(rows.data, [block_m, block_k])), _gluon(w)
    if not _in_units(weight.k):  # TMA can't tell where the first way ends
        return None
    x = rows.data.unflatten(1, (k_ways, weight.k))
    return _gluon(create_ragged_descriptor(x, [block_m, 1, block_k])), _gluon(w)


def _gathered(rows: Rows, size: int, block: int) -> tuple[int | None, int | None]:
    """Stride and number of columns as kernels take them that read `block` columns at a time."""
    if rows.divisor == 0:
        return None, None
    return rows.data.stride(0) // UNIT.value, size // UNIT.value if size % block else None


def _in_units(size: int) -> bool:
    """Whether columns of 16 bit can be copied 16 bytes at a time."""
    return size % UNIT.value == 0


def launch_weight_grad(config: Config, left: Rows, right: Rows, routing: Routing, out: Tensor, spared: int) -> bool:
    """False where only the portable kernel can do it: nothing is launched then. spared: see grid_size."""
    block_p, block_q, block_rows, stages = BLOCK_M.value, BLOCK_N.value, config.block_k, config.num_stages
    if not weight_grad_can(config, left, right):
        return False
    if left.divisor == right.divisor == 0:  # short steps, which are too short to gather in
        block_rows, stages = block_rows // 2, 2 * stages
    num_experts, p_size, q_size = out.shape
    num_tiles = num_experts * cdiv(p_size, block_p) * cdiv(q_size, block_q)
    weight_grad_kernel[grid_size(config, num_tiles, out.device, spared)](
        left.data if left.divisor else _gluon(create_ragged_descriptor(left.data, [block_rows, block_p])),
        right.data if right.divisor else _gluon(create_ragged_descriptor(right.data, [block_rows, block_q])),
        _gluon(TensorDescriptor.from_tensor(out, [1, block_p, QUARTER.value])),
        routing.order_N,
        routing.offsets_E,
        routing.schedule(block_p).heaviest_E,
        num_experts,
        p_size,
        q_size,
        *_gathered(left, p_size, block_p),
        *_gathered(right, q_size, block_q),
        LEFT_DIVISOR=left.divisor or None,
        RIGHT_DIVISOR=right.divisor or None,
        BLOCK_ROWS=block_rows,
        STAGES=stages,
        GROUP_P=config.group_m,
        num_warps=8,
    )
    return True


def weight_grad_can(config: Config, left: Rows, right: Rows) -> bool:
    """Whether launch_weight_grad does it."""
    if not config.overlap or (config.block_m, config.block_n) != (BLOCK_M.value, BLOCK_N.value):
        return False
    reads = (rows.divisor == 0 or _in_units(rows.data.shape[1]) for rows in (left, right))
    return _in_units(right.data.shape[1]) and all(reads) and tma_can_read(left.data) and tma_can_read(right.data)


def _parts_of_h(h_NH: Tensor, glu: Glu, block_m: int, part: int) -> TensorDescriptor:
    """To load what glu.tiles_of_h stores."""
    if glu.h_layout == "concatenated":
        return TensorDescriptor.from_tensor(h_NH.unflatten(1, (2, -1)), [block_m, 1, part])
    return TensorDescriptor.from_tensor(h_NH, [block_m, part if glu.layout == "plain" else 2 * part])


def _gluon(descriptor: TensorDescriptor) -> Any:
    """The same descriptor with the layout that its tiles have in shared memory, which Gluon leaves to the caller."""
    block = list(descriptor.block_shape)
    layout = NVMMASharedLayout.get_default_for(block, bfloat16)  # as for float16: only the width counts
    return GluonDescriptor(descriptor.base, list(descriptor.shape), list(descriptor.strides), block, layout)
