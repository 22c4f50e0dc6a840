"""The fused expert MLP of few tokens on the CPU, as generating text calls it: without gradients and biases.

Between products of single rows Python's code and PyTorch's leave the caches, and a further function takes about as long
as the product of a narrow expert: as few and as few different ones as can be. Rows are neither gathered nor grouped.

T tokens, K experts per token, N slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.activations import activate, gate_and_up
from scatter_ops.cpu.multiply import FEW_ROWS
from scatter_ops.cpu.products import by_vector
from scatter_ops.cpu.routing import VERY_FEW_SLOTS
from scatter_ops.grouping import Groups, accumulation_dtype


def are_few(num_slots: int, groups: Groups) -> bool:
    """Whether products of single rows take no longer than those of each expert's rows. Sentinels aren't meant."""
    return 0 < num_slots == groups.num_valid <= VERY_FEW_SLOTS and max(groups.sizes) <= FEW_ROWS


def mlp_of_few_tokens(
    x_TD: Tensor,
    topk_weights_TK: Tensor,
    order_N: Tensor,
    groups: Groups,
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
    (num_tokens, top_k), experts = topk_weights_TK.shape, [0] * groups.num_valid  # of the slots
    grouped = (e for e, size in zip(groups.experts, groups.sizes, strict=False) for _ in range(size))
    for slot, expert in zip(order_N.tolist(), grouped, strict=True):
        experts[slot] = expert

    def products(vectors: Iterable[Tensor], weight: Sequence[Tensor]) -> Tensor:
        y = x_TD.new_empty(groups.num_valid, weight[0].shape[-1 if transposed else -2])
        return by_vector(vectors, weight, experts, transposed, y)

    rows = [row for row in x_TD.unbind(0) for _ in range(top_k)]
    h_NH = products(rows, gate_up)
    gate, up_NF = (h_NH, products(rows, up)) if up else gate_and_up(h_NH, layout)
    a_NF = activate(gate, up_NF, activation, alpha, limit)
    y_TKD = products(a_NF.unbind(0), down).view(num_tokens, top_k, -1)
    scale_T1K, out_dtype = topk_weights_TK.unsqueeze(1), out_dtype or x_TD.dtype
    if not scale_T1K.dtype == y_TKD.dtype == out_dtype:
        dtype = accumulation_dtype(y_TKD.dtype)
        return torch.bmm(scale_T1K.to(dtype), y_TKD.to(dtype)).squeeze_(1).to(out_dtype)
    return torch.bmm(scale_T1K, y_TKD).squeeze_(1)
