"""Routing and the operators that move rows between tokens, slots and experts, on the CPU.

T tokens, K experts per token, N = T * K slots, E experts, D model width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scatter_ops.cpu.stacked import stacked_grads
from scatter_ops.grouping import Groups, accumulation_dtype, int32_tensor

SUM = 0  # the mode of torch.embedding_bag
FEW_SLOTS = 2048  # up to here one call that sorts takes less time than several that don't
MANY_SLOTS = 2**15  # from here on sorting takes less time the fewer bytes a key has
ADDED_SLOTS = 256  # up to here rows that are added one by one take less time than a sort and a sum of several
VERY_FEW_SLOTS = 32  # up to here Python's own lists take less time than calls of PyTorch


def route(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """An expert's slots come choice by choice: a loop finds them so by `torch.where` in its mask [K, T]."""
    top_k = topk_ids_TK.shape[1]
    if topk_ids_TK.numel() <= VERY_FEW_SLOTS:
        return _route_lists(topk_ids_TK.reshape(-1).tolist(), num_experts, top_k)
    keys_TK = F.threshold(topk_ids_TK, -1, num_experts).clamp_(max=num_experts)  # num_experts: sentinels
    keys_TK = keys_TK if keys_TK.numel() < MANY_SLOTS else keys_TK.to(_smallest_int((num_experts + 1) * top_k))
    if top_k > 1:
        keys_TK = torch.add(torch.arange(top_k, dtype=keys_TK.dtype), keys_TK, alpha=top_k)
    keys_N, order_N = keys_TK.reshape(-1).sort(stable=True)
    last_E = torch.arange(top_k - 1, num_experts * top_k, top_k, dtype=keys_N.dtype)  # each expert's largest key
    return order_N.int(), torch.searchsorted(keys_N, last_E, right=True, out_int32=True)


def _route_lists(ids: list[int], num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    keys = [expert if 0 <= expert < num_experts else num_experts for expert in ids]  # num_experts: sentinels
    slots = range(len(keys))
    if top_k < len(keys):  # not of one token
        slots = [slot for choice in range(top_k) for slot in slots[choice::top_k]]
    order = sorted(slots, key=keys.__getitem__)
    ends: list[int] = []
    for row, slot in enumerate(order):
        ends += [row] * (keys[slot] - len(ends))  # experts before this row's that had no end yet
    ends += [len(keys)] * (num_experts - len(ends))
    return int32_tensor(order), int32_tensor(ends)


def dispatch(x_TD: Tensor, order_N: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    return zero_sentinels(x_TD.index_select(0, slot_tokens(order_N, top_k)), int(offsets_E[-1]))


def combine(
    y_ND: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if not grouped_in:
        rows_N = torch.arange(order_N.numel(), dtype=order_N.dtype)
        return sum_slots(y_ND, topk_weights_TK, rows_N, len(rows_N), top_k, out_dtype)
    return combine_grouped(y_ND, topk_weights_TK, order_N, int(offsets_E[-1]), top_k, out_dtype)


def combine_grouped(
    y_ND: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    num_valid: int,
    top_k: int,
    out_dtype: torch.dtype | None,
    backwards: bool = False,
    overwrite_y: bool = False,
) -> Tensor:
    """The weighted sum of each token's grouped rows of y.

    They are added in the order of their experts, or `backwards`: as a loop over the experts adds them, and as autograd
    does going back through it. The sum of two is the same either way. What needs no wider sum is rounded after it is
    weighted and after each addition, as in the loop, but for one token.
    """
    num_slots, out_dtype = order_N.numel(), out_dtype or y_ND.dtype
    if topk_weights_TK is not None and num_slots > top_k and y_ND.dtype == accumulation_dtype(y_ND.dtype):
        scale_N1 = slot_weights(topk_weights_TK, order_N).to(y_ND.dtype)
        y_ND, topk_weights_TK = torch.mul(y_ND, scale_N1, out=y_ND if overwrite_y else None), None
    if num_slots <= max(ADDED_SLOTS, top_k):
        if num_valid < num_slots:
            y_ND, order_N = y_ND[:num_valid], order_N[:num_valid]
        if num_slots == top_k:
            return sum_of_one_token(y_ND, topk_weights_TK, order_N, out_dtype)
        if topk_weights_TK is not None:
            y_ND = y_ND * slot_weights(topk_weights_TK, order_N).to(accumulation_dtype(y_ND.dtype))
        return _add_to_tokens(y_ND, order_N, num_slots // top_k, top_k, backwards).to(out_dtype)
    rows_N = slot_rows(order_N)
    if topk_weights_TK is None and top_k > 2:
        rows_N = rows_N.view(-1, top_k).sort(1, descending=backwards).values.view(-1)
    return sum_slots(y_ND, topk_weights_TK, rows_N, num_valid, top_k, out_dtype)


def sum_of_one_token(y_ND: Tensor, topk_weights_1K: Tensor | None, order_N: Tensor, out_dtype: torch.dtype) -> Tensor:
    dtype = accumulation_dtype(y_ND.dtype)
    if topk_weights_1K is None:
        return y_ND.sum(0, keepdim=True, dtype=dtype).to(out_dtype)
    weights_1N = topk_weights_1K.index_select(1, order_N)
    if weights_1N.dtype == y_ND.dtype == out_dtype:
        return torch.mm(weights_1N, y_ND)
    return torch.mm(weights_1N.to(dtype), y_ND.to(dtype)).to(out_dtype)


def _add_to_tokens(y_ND: Tensor, order_N: Tensor, num_tokens: int, top_k: int, backwards: bool) -> Tensor:
    rows_ND, tokens_N = y_ND.to(accumulation_dtype(y_ND.dtype)), slot_tokens(order_N, top_k)
    if backwards and top_k > 2:
        rows_ND, tokens_N = rows_ND.flip(0), tokens_N.flip(0)
    return rows_ND.new_zeros(num_tokens, rows_ND.shape[1]).index_add_(0, tokens_N, rows_ND)


def sum_slots(
    y_ND: Tensor,
    topk_weights_TK: Tensor | None,
    rows_N: Tensor,
    num_valid: int,
    top_k: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The weighted sum of each token's rows of y. rows_N: the row of each slot, not read from num_valid on.

    embedding_bag reads the rows where they are and sums them in one pass, in fp32 those of a lower precision too. But
    it rounds ties up, which unweighted sums of bfloat16 often are: it is given fp32 then.
    """
    out_dtype, num_slots, padding = out_dtype or y_ND.dtype, rows_N.numel(), None
    alike = topk_weights_TK is not None and topk_weights_TK.dtype == y_ND.dtype == out_dtype
    dtype = y_ND.dtype if alike else accumulation_dtype(y_ND.dtype)
    if num_valid < num_slots:
        padding = num_valid  # the first sentinel's row: embedding_bag doesn't read it
        rows_N = rows_N.clamp(max=num_valid)
    scale_N = None if topk_weights_TK is None else topk_weights_TK.to(dtype).reshape(-1)
    first_T = torch.arange(0, num_slots, top_k, dtype=rows_N.dtype)
    dense_ND = y_ND.to(dtype).contiguous()
    out_TD = torch.embedding_bag(dense_ND, rows_N, first_T, False, SUM, False, scale_N, False, padding)[0]
    return out_TD.to(out_dtype)


def combine_backward(
    grad_out_TD: Tensor,
    y_ND: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    need_y: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(y_ND.dtype)
    slots_N = order_N if grouped_in else torch.arange(order_N.numel(), dtype=torch.int32)
    grad_ND = grad_out_TD.to(dtype).index_select(0, slots_N // top_k)
    grad_y, grad_weights = y_ND.new_empty(0), y_ND.new_empty(0)
    if need_weights:
        assert topk_weights_TK is not None
        grad_N = torch.sum(grad_ND * y_ND.to(dtype), 1).to(topk_weights_TK.dtype)  # rounded as by autograd
        grad_N = slot_values(grad_N, order_N, int(offsets_E[-1])) if grouped_in else grad_N
        grad_weights = grad_N.view_as(topk_weights_TK)
    if need_y:
        if topk_weights_TK is not None:
            grad_ND *= topk_weights_TK.to(dtype).reshape(-1, 1).index_select(0, slots_N)
        grad_y = grad_ND.to(y_ND.dtype)
        grad_y = zero_sentinels(grad_y, int(offsets_E[-1])) if grouped_in else grad_y
    return grad_y, grad_weights


def expand(param: Sequence[Tensor], offsets_E: Tensor, num_rows: int, out_dtype: torch.dtype | None = None) -> Tensor:
    per_expert = (param[0] if len(param) == 1 else torch.stack(tuple(param))).to(out_dtype or param[0].dtype)
    experts_N = torch.searchsorted(offsets_E, torch.arange(num_rows, dtype=torch.int32), right=True, out_int32=True)
    y = per_expert.index_select(0, experts_N.clamp_(max=per_expert.shape[0] - 1))
    return zero_sentinels(y, int(offsets_E[-1]))


def expand_backward(grad: Tensor, offsets_E: Tensor) -> Tensor:
    groups = Groups.read(offsets_E, grad.shape[0])
    return sum_groups(grad, groups, stacked_grads((groups.num_experts, *grad.shape[1:]), grad, groups))


def sum_groups(rows: Tensor, groups: Groups, out: Tensor) -> Tensor:
    """Write the sum of each expert's grouped rows to its row of `out`; the others' are left alone."""
    for e, rows_of_expert in zip(groups.experts, groups.split(rows), strict=False):
        torch.sum(rows_of_expert, 0, out=out[e])
    return out


def slot_rows(order_N: Tensor) -> Tensor:
    """The grouped row of each slot: the inverse of order."""
    if order_N.numel() <= FEW_SLOTS:
        return order_N.argsort()
    rows_N = torch.empty_like(order_N)
    return rows_N.scatter_(0, order_N.long(), torch.arange(order_N.numel(), dtype=order_N.dtype))


def slot_values(values_N: Tensor, order_N: Tensor, num_valid: int) -> Tensor:
    """The values of grouped rows, each in its slot's place; zero for sentinels."""
    num_slots = order_N.numel()
    if num_valid < num_slots:
        values_N, order_N = values_N[:num_valid], order_N[:num_valid]
    return values_N.new_zeros(num_slots).index_add_(0, order_N, values_N)  # index_copy_ takes no int32


def slot_weights(topk_weights_TK: Tensor, order_N: Tensor) -> Tensor:
    """The router weight of each grouped row, [N, 1]."""
    return topk_weights_TK.reshape(-1, 1).index_select(0, order_N)


def slot_tokens(order_N: Tensor, top_k: int) -> Tensor:
    """The token of each grouped row."""
    if order_N.numel() <= VERY_FEW_SLOTS:
        return int32_tensor([slot // top_k for slot in order_N.tolist()])
    return order_N if top_k == 1 else order_N // top_k


def token_rows(rows_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """The token's row for each grouped row, one for all if there is one token."""
    return rows_TD if order_N.numel() == top_k else rows_TD.index_select(0, slot_tokens(order_N, top_k))


def zero_sentinels(rows: Tensor, num_valid: int) -> Tensor:
    """Zero the grouped rows past the last expert's, in place."""
    if num_valid < rows.shape[0]:
        rows[num_valid:].zero_()
    return rows


def _smallest_int(largest: int) -> torch.dtype:
    return next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(t).max)
