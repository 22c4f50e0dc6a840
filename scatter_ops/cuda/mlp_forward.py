"""mlp_forward on CUDA: gate-up GEMM with the activation in its epilogue, down GEMM, combine.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from scatter_ops.cuda.device import on_its_device
from scatter_ops.cuda.grouped_gemm import (
    Routing,
    Rows,
    grid_size,
    grouped_gemm,
    product_options,
    select_config,
    tma_can_read,
    uses_tma,
)
from scatter_ops.cuda.parameters import ExpertBias, ExpertWeight, expert_bias, expert_weight, separate_weight
from scatter_ops.cuda.rows import combine_rows
from scatter_ops.kernels.glu_forward import glu_forward_kernel


@on_its_device
def mlp_forward(
    x_TD: Tensor,
    topk_weights_TK: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: str,
    transposed: bool,
    weight_on: str,
    alpha: float,
    limit: float,
    out_dtype: torch.dtype | None,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    """Returns out [T, D] and h [N, H] in grouped order and the parameters' column order; h is [0] unless save_h."""
    top_k = topk_weights_TK.shape[1]
    routing = Routing(order_N, offsets_E)
    on_input = weight_on == "input"
    weight = gate_up_weight(gate_up, up, layout, transposed)
    biases = expert_bias(gate_up_bias), expert_bias(up_bias)
    weights_TK = topk_weights_TK.contiguous()
    a_NF, h = glu_forward(
        Rows(x_TD, top_k), weight, biases, weights_TK, routing, activation, layout, on_input, alpha, limit, save_h
    )
    y_ND = grouped_gemm(
        Rows(a_NF, 0),
        expert_weight(down, transposed),
        expert_bias(down_bias),
        routing,
        scatter=False,
        zero_unrouted=False,
    )
    inverse_N = routing.inverse_N if routing.num_slots else order_N
    out_TD = combine_rows(y_ND, None if on_input else weights_TK, inverse_N, top_k, True, out_dtype or x_TD.dtype)
    return out_TD, h


def gate_up_weight(gate_up: Sequence[Tensor], up: Sequence[Tensor], layout: str, transposed: bool) -> ExpertWeight:
    """[E, 2, F, D] where gate and up are apart, [E, 1, H, D] for the plain and the interleaved layout."""
    if layout == "separate":
        return separate_weight(gate_up, up, transposed)
    weight = expert_weight(gate_up, transposed)
    return weight.in_two_ways() if layout == "concatenated" else weight


def kernel_layout(layout: str) -> str:
    """Column order of h: gate and up of the separate layout are stored side by side."""
    return "concatenated" if layout == "separate" else layout


def glu_forward(
    rows: Rows,
    weight: ExpertWeight,
    biases: tuple[ExpertBias, ExpertBias],
    topk_weights_TK: Tensor,
    routing: Routing,
    activation: str,
    layout: str,
    on_input: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    """A [N, F] and h ([0] unless save_h)."""
    num_slots = routing.num_slots
    h_size = weight.n * weight.ways
    f_size = h_size if layout == "plain" else h_size // 2
    a_NF = rows.data.new_empty(num_slots, f_size)
    h = rows.data.new_empty((num_slots, h_size) if save_h else 0)
    if a_NF.numel() == 0:
        return a_NF, h
    config = select_config("glu_forward", rows.data, routing, h_size, weight.k)
    tiles = routing.schedule(config.block_m, with_inverse=True)
    x, w, options = product_options(rows, weight, config, config.block_n, n_ways=weight.ways)
    block_f = config.block_n if layout == "plain" else config.block_n // 2
    grid = grid_size(config, tiles.max_row_tiles * triton.cdiv(f_size, block_f), a_NF.device)
    out_tma = uses_tma(config, a_NF.device) and tma_can_read(a_NF)
    glu_forward_kernel[grid](
        x,
        w,
        biases[0].data,
        biases[1].data,
        topk_weights_TK,
        create_ragged_descriptor(a_NF, [config.block_m, block_f]) if out_tma else a_NF,
        ragged_h(h, layout, config.block_m, block_f) if out_tma and save_h else h,
        h,
        routing.order_N,
        routing.offsets_E,
        tiles.tile_map,
        alpha,
        limit,
        num_slots,
        f_size,
        h_size,
        weight.k,
        rows.data.stride(0),
        *weight.strides,
        biases[0].stride_e,
        biases[1].stride_e,
        NUM_EXPERTS=routing.num_experts,
        X_DIVISOR=rows.divisor,
        ACTIVATION=activation,
        LAYOUT=kernel_layout(layout),
        SCALE_INPUT=on_input,
        STORE_H=save_h,
        BIAS=biases[0].kind,
        OUT_TMA=out_tma,
        BLOCK_F=block_f,
        **options,
    )
    return a_NF, h


def ragged_h(h_NH: Tensor, layout: str, block_m: int, block_f: int) -> TensorDescriptor:
    """Descriptor to store tiles of h, or of a tensor like it: [N, H], or [N, 2, F] where gate and up are side by side."""
    if kernel_layout(layout) == "concatenated":
        return create_ragged_descriptor(h_NH.unflatten(1, (2, -1)), [block_m, 1, block_f])
    return create_ragged_descriptor(h_NH, [block_m, block_f if layout == "plain" else 2 * block_f])


def readable_h(h_NH: Tensor, layout: str, block_m: int, block_f: int) -> TensorDescriptor:
    """Descriptor to load tiles of h: rows beyond an expert's end are read too, and not used."""
    if kernel_layout(layout) == "concatenated":
        return TensorDescriptor.from_tensor(h_NH.unflatten(1, (2, -1)), [block_m, 1, block_f])
    return TensorDescriptor.from_tensor(h_NH, [block_m, block_f if layout == "plain" else 2 * block_f])
