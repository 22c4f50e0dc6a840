"""Launch of the gate-up GEMM with the activation in its epilogue."""

from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor

from scatter_ops.cuda.dispatch import regrouped
from scatter_ops.cuda.glu import Glu
from scatter_ops.cuda.integers import cdiv
from scatter_ops.cuda.operands import Rows, grid_size, product_options, select_config, tma_can_read, uses_tma
from scatter_ops.cuda.optional_hopper import hopper
from scatter_ops.cuda.parameters import ExpertWeight
from scatter_ops.cuda.recording import launch
from scatter_ops.kernels.glu_forward import glu_forward_kernel


def glu_forward(rows: Rows, weight: ExpertWeight, glu: Glu, save_h: bool) -> tuple[Tensor, Tensor]:
    """A [N, F] and the pre-activation h [N, H] ([0] unless save_h), both in grouped order."""
    routing, h_size = glu.routing, weight.n * weight.ways
    f_size = glu.f_size(h_size)
    a_NF = rows.data.new_empty(routing.num_slots, f_size)
    h = rows.data.new_empty((routing.num_slots, h_size) if save_h else 0)
    if a_NF.numel() == 0:
        return a_NF, h
    config = select_config("glu_forward", rows.data, routing, h_size, weight.k, weight.stride_k == 1)
    tiles = routing.schedule(config.block_m, with_inverse=True)
    if config.regroup:
        rows = regrouped(rows, routing)
    block_f = glu.f_size(config.block_n)
    results_by_tma = uses_tma(config, a_NF.device) and tma_can_read(a_NF)
    if hopper is not None and results_by_tma and hopper.launch_glu_forward(config, rows, weight, glu, tiles, a_NF, h):
        return a_NF, h
    x, w, options = product_options(rows, weight, config, config.block_n, n_ways=weight.ways)
    # A tile of an interleaved h has twice the columns of the others: shared memory has no room for it on its way out.
    roomy = glu.layout != "interleaved" or not save_h
    out_tma = config.tma_out and roomy and results_by_tma
    launch(
        glu_forward_kernel,
        grid_size(config, tiles.max_row_tiles * cdiv(f_size, block_f), a_NF.device),
        x,
        w,
        glu.gate_bias.data,
        glu.up_bias.data,
        glu.topk_weights,
        create_ragged_descriptor(a_NF, [config.block_m, block_f]) if out_tma else a_NF,
        glu.tiles_of_h(h, config.block_m, block_f) if out_tma and save_h else h,
        h,
        routing.order_N,
        routing.offsets_E,
        tiles.tile_map,
        glu.alpha,
        glu.limit,
        routing.num_slots,
        routing.num_experts,
        f_size,
        h_size,
        weight.k,
        rows.data.stride(0),
        *weight.strides,
        *glu.bias_strides,
        X_DIVISOR=rows.divisor,
        ACTIVATION=glu.activation,
        LAYOUT=glu.h_layout,
        SCALE_INPUT=glu.on_input,
        STORE_H=save_h,
        GATE_BIAS=glu.gate_bias.kind,
        UP_BIAS=glu.up_bias_kind,
        OUT_TMA=out_tma,
        BLOCK_F=block_f,
        **options,
    )
    return a_NF, h
