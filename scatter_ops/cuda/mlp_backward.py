"""mlp_backward on CUDA: down GEMM backward with the activation's derivative in its epilogue, weight gradients, dX.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor

from scatter_ops.cuda.device import on_its_device
from scatter_ops.cuda.grouped_gemm import (
    NO_BIAS,
    Routing,
    Rows,
    grid_size,
    grouped_gemm,
    product_options,
    select_config,
    tma_can_read,
    uses_tma,
)
from scatter_ops.cuda.mlp_forward import kernel_layout, ragged_h, readable_h
from scatter_ops.cuda.parameters import ExpertBias, ExpertWeight, expert_bias, expert_weight, separate_weight
from scatter_ops.cuda.rows import combine_rows
from scatter_ops.cuda.weight_grad import grouped_sum, weight_grad
from scatter_ops.kernels.glu_backward import bias_partials_kernel, glu_backward_kernel, sum_partials_kernel


@dataclass(frozen=True)
class Mlp:
    """What the phases of the backward share about the forward."""

    routing: Routing
    topk_weights_TK: Tensor
    activation: str
    layout: str
    on_input: bool
    alpha: float
    limit: float

    @property
    def top_k(self) -> int:
        return self.topk_weights_TK.shape[1]


@dataclass(frozen=True)
class GluGradients:
    """Results of the first phase; None where nobody needs them."""

    grad_h_NH: Tensor | None
    grad_pre_NH: Tensor | None
    scaled_a_NF: Tensor | None
    grad_topk_weights_TK: Tensor | None


@on_its_device
def mlp_backward(
    grad_out_TD: Tensor,
    h: Tensor,
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
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, topk_weights, gate_up, up, down, gate_up_bias, up_bias, down_bias; [0] where not needed."""
    mlp = Mlp(
        Routing(order_N, offsets_E),
        topk_weights_TK.contiguous(),
        activation,
        layout,
        weight_on == "input",
        alpha,
        limit,
    )
    need_x, need_s, need_gate_up, need_up, need_down, need_gate_up_bias, need_up_bias, need_down_bias = needs
    grads = [x_TD.new_empty(0)] * len(needs)
    grad_rows = Rows(grad_out_TD.to(x_TD.dtype), mlp.top_k)
    if need_down_bias:
        grads[7] = grouped_sum(grad_rows, None if mlp.on_input else mlp.topk_weights_TK, mlp.routing, x_TD.dtype)
    if not any(needs[:7]):
        return tuple(grads)

    need_h = need_x or need_gate_up or need_up
    need_pre = need_gate_up_bias or need_up_bias
    first = glu_backward(
        grad_rows, h, expert_weight(down, transposed).transposed(), (gate_up_bias, up_bias, down_bias), mlp,
        need_h, need_pre, need_down, need_s,
    )  # fmt: skip
    if first.grad_topk_weights_TK is not None:
        grads[1] = first.grad_topk_weights_TK
    if first.scaled_a_NF is not None:
        grads[4] = _oriented_weight_grad(grad_rows, Rows(first.scaled_a_NF, 0), mlp.routing, transposed)
    if first.grad_pre_NH is not None:
        pre_halves = _projections(first.grad_pre_NH, layout)
        for i, needed in enumerate((need_gate_up_bias, need_up_bias)):
            if needed:
                grads[5 + i] = grouped_sum(Rows(pre_halves[i], 0), None, mlp.routing, x_TD.dtype)
    if first.grad_h_NH is not None:
        x_rows = Rows(x_TD, mlp.top_k)
        h_halves = _projections(first.grad_h_NH, layout)
        for i, needed in enumerate((need_gate_up, need_up)):
            if needed:
                grads[2 + i] = _oriented_weight_grad(Rows(h_halves[i], 0), x_rows, mlp.routing, transposed)
        if need_x:
            weight = (
                separate_weight(gate_up, up, transposed) if layout == "separate" else expert_weight(gate_up, transposed)
            )
            grads[0] = _grad_x(first.grad_h_NH, weight, mlp)
    return tuple(grads)


def glu_backward(
    grad_rows: Rows,
    h_NH: Tensor,
    weight: ExpertWeight,
    bias_tensors: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    mlp: Mlp,
    need_h: bool,
    need_pre: bool,
    need_a: bool,
    need_s: bool,
) -> GluGradients:
    """weight: down as seen by the product with grad_out, [E, F, D]."""
    f_size, h_size, num_slots = weight.n, h_NH.shape[1], mlp.routing.num_slots
    # The one place that decides where dH goes: the kernel reads a tile of h before it writes that tile of dH, so h's own
    # memory would do once h is no longer an input that callers may read again.
    grad_h = torch.empty_like(h_NH) if need_h or (need_pre and not mlp.on_input) else None
    grad_pre = torch.empty_like(h_NH) if need_pre and mlp.on_input else None
    scaled_a = h_NH.new_empty(num_slots, f_size) if need_a else None
    config = select_config("glu_backward", h_NH, mlp.routing, f_size, weight.k)
    num_tiles = triton.cdiv(f_size, config.block_n)
    has_bias_column = bool(bias_tensors[2]) and not mlp.on_input
    num_partials = num_tiles + has_bias_column
    partials = torch.empty(num_slots, num_partials, dtype=torch.float32, device=h_NH.device) if need_s else None
    result = GluGradients(
        grad_h,
        grad_h if grad_pre is None and need_pre else grad_pre,
        scaled_a,
        torch.empty_like(mlp.topk_weights_TK) if need_s else None,
    )
    if num_slots == 0:
        return result

    # Without a gradient of h or of the router weights nothing but the activation is needed: the product is empty then.
    k_size = weight.k if need_h or need_pre or need_s else 0
    tiles = mlp.routing.schedule(config.block_m, with_inverse=True)
    gate_bias, up_bias = expert_bias(bias_tensors[0]), expert_bias(bias_tensors[1])
    grad, w, options = product_options(grad_rows, weight, config, config.block_n, n_ways=1)
    part = config.block_n // config.epilogue_parts
    out_tma = uses_tma(config, h_NH.device) and tma_can_read(h_NH[:, :f_size])

    def tiles_of(like_h: Tensor | None) -> object:
        return ragged_h(like_h, mlp.layout, config.block_m, part) if out_tma and like_h is not None else like_h

    glu_backward_kernel[grid_size(config, tiles.max_row_tiles * num_tiles, h_NH.device)](
        grad,
        w,
        readable_h(h_NH, mlp.layout, config.block_m, part) if out_tma else h_NH,
        h_NH,
        gate_bias.data,
        up_bias.data,
        mlp.topk_weights_TK,
        tiles_of(grad_h),
        tiles_of(grad_pre),
        create_ragged_descriptor(scaled_a, [config.block_m, part]) if out_tma and scaled_a is not None else scaled_a,
        partials,
        mlp.routing.order_N,
        mlp.routing.offsets_E,
        tiles.tile_map,
        mlp.alpha,
        mlp.limit,
        f_size,
        h_size,
        k_size,
        num_partials,
        grad_rows.data.stride(0),
        *weight.strides,
        gate_bias.stride_e,
        up_bias.stride_e,
        GRAD_DIVISOR=grad_rows.divisor,
        ACTIVATION=mlp.activation,
        LAYOUT=kernel_layout(mlp.layout),
        SCALE_INPUT=mlp.on_input,
        BIAS=gate_bias.kind,
        OUT_TMA=out_tma,
        SPLIT=config.epilogue_parts,
        BLOCK_F=config.block_n,
        **options,
    )
    if partials is not None and result.grad_topk_weights_TK is not None:
        if has_bias_column:
            _add_bias_partials(partials, grad_rows, expert_bias(bias_tensors[2]), mlp)
        sum_partials(partials, mlp.routing.inverse_N, result.grad_topk_weights_TK)
    return result


def _add_bias_partials(partials: Tensor, grad_rows: Rows, bias: ExpertBias, mlp: Mlp) -> None:
    """Fill the last column of partials with <grad_out, down_bias>: the router weight multiplies the bias too."""
    block_m = 16
    tiles = mlp.routing.schedule(block_m)
    num_columns = grad_rows.data.shape[1]
    bias_partials_kernel[(tiles.max_row_tiles,)](
        grad_rows.data,
        bias.data,
        partials,
        mlp.routing.order_N,
        mlp.routing.offsets_E,
        tiles.tile_map,
        num_columns,
        grad_rows.data.stride(0),
        bias.stride_e,
        partials.shape[1],
        partials.shape[1] - 1,
        TOP_K=mlp.top_k,
        BIAS=bias.kind,
        BLOCK_M=block_m,
        BLOCK_D=min(256, max(16, triton.next_power_of_2(num_columns))),
    )


def sum_partials(partials: Tensor, inverse_N: Tensor, out: Tensor) -> None:
    """out[slot] = sum of the slot's partials; 0 for a sentinel."""
    num_slots, num_partials = partials.shape
    block = 128
    sum_partials_kernel[(triton.cdiv(num_slots, block),)](
        partials, inverse_N, out, num_slots, num_partials, block, triton.next_power_of_2(num_partials)
    )


def _grad_x(grad_h_NH: Tensor, weight: ExpertWeight, mlp: Mlp) -> Tensor:
    """[T, D]: dH times gate and up, summed over each token's slots."""
    grad_slots_ND = grouped_gemm(
        Rows(grad_h_NH, 0), weight.transposed(), NO_BIAS, mlp.routing, scatter=False, zero_unrouted=False
    )
    inverse_N = mlp.routing.inverse_N if mlp.routing.num_slots else mlp.routing.order_N
    return combine_rows(grad_slots_ND, None, inverse_N, mlp.top_k, True, grad_h_NH.dtype)


def _oriented_weight_grad(grad: Rows, x: Rows, routing: Routing, transposed: bool) -> Tensor:
    """[E, out, in], or [E, in, out] if transposed."""
    return weight_grad(x, grad, routing) if transposed else weight_grad(grad, x, routing)


def _projections(h_NH: Tensor, layout: str) -> Sequence[Tensor]:
    """The columns of h that belong to gate_up and, where it is apart, to up."""
    return h_NH.chunk(2, dim=1) if layout == "separate" else (h_NH,)
