"""Launch of the down GEMM's backward with the activation's derivative in its epilogue, and of what sums its partials.

N slots, D model width, F expert width, H columns of h.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor

from scatter_ops.cuda.dispatch import regrouped
from scatter_ops.cuda.glu import Glu
from scatter_ops.cuda.integers import cdiv, next_power_of_2
from scatter_ops.cuda.operands import Rows, grid_size, product_options, select_config, tma_can_read, uses_tma
from scatter_ops.cuda.optional_hopper import hopper
from scatter_ops.cuda.parameters import ALIGNMENT, ExpertBias, ExpertWeight
from scatter_ops.kernels.glu_backward import glu_backward_kernel
from scatter_ops.kernels.partials import bias_partials_kernel, sum_partials_kernel
from scatter_ops.tuning import Config


class GluGradients(NamedTuple):
    """None where nobody needs it.

    grad_h: of h. grad_pre: of the pre-activation, which is h itself unless the router weight is on the input.
    scaled_a: A, times the router weight if that is on the output. partials: [N, parts], the router weight's gradient
    in parts.
    """

    grad_h_NH: Tensor | None
    grad_pre_NH: Tensor | None
    scaled_a_NF: Tensor | None
    partials: Tensor | None


def glu_backward(
    grad: Rows,
    h_NH: Tensor,
    down: ExpertWeight,
    glu: Glu,
    need_h: bool,
    need_pre: bool,
    need_a: bool,
    num_partials: int,
    overwrite_h: bool,
) -> GluGradients:
    """grad: of y before the router weight. down: seen as [E, F, D]. num_partials: columns to leave room for.

    overwrite_h: dH may take the memory of h, which the kernel reads tile by tile before it writes. It does so where it
    is stored by TMA. Stored through pointers, into lines that loads of h are still fetching, it halves the speed.
    """
    f_size, num_slots = down.n, glu.routing.num_slots
    need_h = need_h or (need_pre and not glu.on_input)
    config = select_config("glu_backward", h_NH, glu.routing, f_size, down.k)
    # Tiles of A and of h's halves lie f_size columns apart.
    aligned = f_size * h_NH.element_size() % ALIGNMENT == 0 and tma_can_read(h_NH)
    out_tma = config.tma_out and uses_tma(config, h_NH.device) and aligned
    grad_h = (h_NH if overwrite_h and out_tma else torch.empty_like(h_NH)) if need_h else None
    grad_pre = torch.empty_like(h_NH) if need_pre and glu.on_input else None
    scaled_a = h_NH.new_empty(num_slots, f_size) if need_a else None
    partials = h_NH.new_empty(num_slots, num_partials, dtype=torch.float32) if num_partials else None
    if h_NH.numel():
        _launch(config, out_tma, grad, h_NH, down, glu, grad_h, grad_pre, scaled_a, partials)
    return GluGradients(grad_h, grad_pre if glu.on_input else grad_h, scaled_a, partials)


def num_column_tiles(h_NH: Tensor, down: ExpertWeight, glu: Glu) -> int:
    """Partials of the router weight's gradient that glu_backward writes for each slot."""
    return cdiv(down.n, select_config("glu_backward", h_NH, glu.routing, down.n, down.k).block_n)


def _launch(
    config: Config,
    out_tma: bool,
    grad: Rows,
    h_NH: Tensor,
    down: ExpertWeight,
    glu: Glu,
    grad_h: Tensor | None,
    grad_pre: Tensor | None,
    scaled_a: Tensor | None,
    partials: Tensor | None,
) -> None:
    f_size, h_size, routing = down.n, h_NH.shape[1], glu.routing
    tiles = routing.schedule(config.block_m, with_inverse=True)
    operands = grad, h_NH, down, glu, tiles, grad_h, scaled_a, partials
    if hopper is not None and out_tma and grad_pre is None and hopper.launch_glu_backward(config, *operands):
        return
    grad = regrouped(grad, routing) if config.overlap else grad  # the portable kernel can't gather beside its products
    grad_out, w, options = product_options(grad, down, config, config.block_n, n_ways=1)
    part = config.block_n // config.epilogue_parts

    def tiles_of(like_h: Tensor | None) -> object:
        return glu.tiles_of_h(like_h, config.block_m, part) if out_tma and like_h is not None else like_h

    # Without a gradient of h or of the router weights nothing but the activation is needed: the product is empty then.
    only_a = grad_h is None and grad_pre is None and partials is None
    glu_backward_kernel[grid_size(config, tiles.max_row_tiles * cdiv(f_size, config.block_n), h_NH.device)](
        grad_out,
        w,
        h_NH,
        glu.gate_bias.data,
        glu.up_bias.data,
        glu.topk_weights,
        tiles_of(grad_h),
        tiles_of(grad_pre),
        create_ragged_descriptor(scaled_a, [config.block_m, part]) if out_tma and scaled_a is not None else scaled_a,
        partials,
        routing.order_N,
        routing.offsets_E,
        tiles.tile_map,
        glu.alpha,
        glu.limit,
        f_size,
        h_size,
        0 if only_a else down.k,
        0 if partials is None else partials.shape[1],
        grad.data.stride(0),
        *down.strides,
        *glu.bias_strides,
        GRAD_DIVISOR=grad.divisor,
        ACTIVATION=glu.activation,
        LAYOUT=glu.h_layout,
        SCALE_INPUT=glu.on_input,
        GATE_BIAS=glu.gate_bias.kind,
        UP_BIAS=glu.up_bias_kind,
        OUT_TMA=out_tma,
        SPLIT=config.epilogue_parts,
        BLOCK_F=config.block_n,
        **options,
    )


def add_bias_partials(partials: Tensor, grad_out: Rows, bias: ExpertBias, glu: Glu) -> None:
    """Fill the last column of partials with <grad_out, down_bias>: the router weight multiplies the bias too."""
    block_m = 16
    tiles = glu.routing.schedule(block_m)
    num_columns = grad_out.data.shape[1]
    bias_partials_kernel[(tiles.max_row_tiles,)](
        grad_out.data,
        bias.data,
        partials,
        glu.routing.order_N,
        glu.routing.offsets_E,
        tiles.tile_map,
        num_columns,
        grad_out.data.stride(0),
        bias.stride_e,
        partials.shape[1],
        partials.shape[1] - 1,
        TOP_K=glu.top_k,
        BIAS=bias.kind,
        BLOCK_M=block_m,
        BLOCK_D=min(256, max(16, next_power_of_2(num_columns))),
    )


def sum_partials(partials: Tensor, glu: Glu) -> Tensor:
    """Gradient of topk_weights [T, K]: the sum of each slot's partials; 0 for a sentinel."""
    out_TK = torch.empty_like(glu.topk_weights)
    num_slots, num_partials = partials.shape
    if num_slots:
        block = 128
        sum_partials_kernel[(cdiv(num_slots, block),)](
            partials,
            glu.routing.inverse_N,
            out_TK,
            num_slots,
            num_partials,
            block,
            next_power_of_2(num_partials),
        )
    return out_TK
