"""Gradients of x and of gate and up, from dH: the last products of the backward pass.

The sum over each token's slots that ends the gradient of x moves memory and leaves the tensor cores idle; the weight
gradients do the opposite. Where the sum takes long it runs beside them, on multiprocessors that they leave to it.

T tokens, K experts per token, N = T * K slots, E experts, D model width, H columns of h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cuda.dispatch import regrouped
from scatter_ops.cuda.glu import Glu
from scatter_ops.cuda.grouped_gemm import NO_BIAS, grouped_gemm
from scatter_ops.cuda.operands import Rows, select_config
from scatter_ops.cuda.parameters import expert_weight, separate_weight
from scatter_ops.cuda.rows import combine_into, combine_rows
from scatter_ops.cuda.streams import aside
from scatter_ops.cuda.weight_grad import oriented_weight_grad, reads_in_place

LEAST_BYTES_ASIDE = 2**27  # a shorter sum isn't worth two streams
MOST_SPARED = 8
# One multiprocessor sums the rows of x's gradient while the others multiply them by this many columns of dH.
COLUMNS_FOR_ONE = 8192


def gate_up_backward(
    grad_h_NH: Tensor,
    x_TD: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    transposed: bool,
    glu: Glu,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, gate_up and up, None where `needs` says so."""
    need_x, *need_weights = needs
    of_weights = grad_h_NH, x_TD, transposed, glu, need_weights
    of_slots = grad_h_NH, gate_up, up, transposed, glu
    spared = _num_spared(grad_h_NH, x_TD, glu) if need_x and any(need_weights) else 0
    if spared == 0:
        grads = _weight_grads(*of_weights)
        return [_sum(_grad_slots(*of_slots), glu) if need_x else None, *grads]
    # The rows of x's gradient come before the weights' here; without a copy of x's rows the peak is the same.
    grad_slots_ND = _grad_slots(*of_slots)
    grad_x_TD, inverse_N = x_TD.new_empty(x_TD.shape), glu.routing.inverse_N
    rows_are_there = torch.cuda.current_stream().record_event()
    grads = _weight_grads(*of_weights, spared)  # first: the sum takes what is left
    with aside(rows_are_there):
        combine_into(grad_x_TD, grad_slots_ND, None, inverse_N, True)
    return [grad_x_TD, *grads]


def _num_spared(grad_h_NH: Tensor, x_TD: Tensor, glu: Glu) -> int:
    """Multiprocessors that the weight gradients leave to the sum; 0: it comes after them."""
    num_slots, h_size = grad_h_NH.shape
    long = num_slots * x_TD.shape[1] * x_TD.element_size() >= LEAST_BYTES_ASIDE
    operands = Rows(glu.projections(grad_h_NH)[0], 0), Rows(x_TD, glu.top_k)
    if not (grad_h_NH.is_cuda and long and reads_in_place(*operands, glu.routing)):
        return 0
    return min(MOST_SPARED, COLUMNS_FOR_ONE // h_size)


def _weight_grads(
    grad_h_NH: Tensor, x_TD: Tensor, transposed: bool, glu: Glu, needs: Sequence[bool], spared: int = 0
) -> list[Tensor | None]:
    """Of gate_up and of up."""
    grads: list[Tensor | None] = [None, None]
    if not any(needs):  # x may be empty then
        return grads
    routing, halves = glu.routing, glu.projections(grad_h_NH)
    config = select_config("weight_grad", x_TD, routing, halves[0].shape[1], x_TD.shape[1])
    x_rows = Rows(x_TD, glu.top_k)
    if config.regroup:  # once for both
        x_rows = regrouped(x_rows, routing)
    for i, half in enumerate(halves):
        if needs[i]:
            grads[i] = oriented_weight_grad(Rows(half, 0), x_rows, routing, transposed, spared)
    return grads


def _grad_slots(
    grad_h_NH: Tensor, gate_up: Sequence[Tensor], up: Sequence[Tensor], transposed: bool, glu: Glu
) -> Tensor:
    """[N, D]: the grouped rows of dH times gate and up."""
    separate = glu.layout == "separate"
    weight = separate_weight(gate_up, up, transposed) if separate else expert_weight(gate_up, transposed)
    rows = Rows(grad_h_NH, 0)
    return grouped_gemm(rows, weight.transposed(), NO_BIAS, glu.routing, scatter=False, zero_unrouted=False)


def _sum(grad_slots_ND: Tensor, glu: Glu) -> Tensor:
    """[T, D]: over each token's slots."""
    inverse_N = glu.routing.inverse_N if glu.routing.num_slots else glu.routing.order_N
    return combine_rows(grad_slots_ND, None, inverse_N, glu.top_k, True, grad_slots_ND.dtype)
