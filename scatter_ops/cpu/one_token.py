"""The fused expert MLP of one token on the CPU, as generating text calls it: without gradients and biases.

Between products of single rows Python's code and PyTorch's leave the caches, and a further function takes about as long
as the product of a narrow expert: as few and as few different ones as can be. In half precision a product itself takes
several times as long, and copies of the matrices for one batched product take less time.

K experts per token, E experts, D model width, F expert width, H columns of h (F, gated 2F).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.activations import activate, gate_and_up
from scatter_ops.cpu.routing import sum_of_one_token


def mlp_of_one_token(
    x_1D: Tensor,
    topk_weights_1K: Tensor,
    order_K: Tensor,
    offsets_E: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
    layout: str,
    transposed: bool,
    alpha: float,
    limit: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    experts: list[int] = []  # of the grouped rows
    for expert, end in enumerate(offsets_E.tolist()):
        experts += [expert] * (end - len(experts))
    rows, ones = [x_1D] * len(experts), [1] * len(experts)
    h_KH = _products(rows, gate_up, experts, transposed)
    gate, up_KF = (h_KH, _products(rows, up, experts, transposed)) if up else gate_and_up(h_KH, layout)
    a_KF = activate(gate, up_KF, activation, alpha, limit)
    y_KD = _products(a_KF.split_with_sizes(ones), down, experts, transposed)
    valid_K = order_K if len(experts) == order_K.shape[0] else order_K[: len(experts)]
    return sum_of_one_token(y_KD, topk_weights_1K, valid_K, out_dtype or x_1D.dtype)


def _products(rows: Sequence[Tensor], weight: Sequence[Tensor], experts: list[int], transposed: bool) -> Tensor:
    """W_e x of each row [1, in] and its expert; Tensor.split is Python, too, and takes as long as several."""
    if weight[0].dim() == 3:
        stack = weight[0] if transposed else weight[0].mT
        matrices = [stack[e] for e in experts]
    else:
        matrices = [weight[e] if transposed else weight[e].t() for e in experts]
    y = weight[0].new_empty(len(rows), weight[0].shape[-1 if transposed else -2])
    for row, matrix, out in zip(rows, matrices, y.split_with_sizes([1] * len(rows)), strict=True):
        torch.mm(row, matrix, out=out)
    return y
