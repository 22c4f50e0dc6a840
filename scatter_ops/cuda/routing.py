"""route and the scheduling metadata of grouped GEMMs. T tokens, K experts per token, N = T * K slots, E experts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scatter_ops.cuda.device import on_its_device
from scatter_ops.cuda.integers import cdiv, next_power_of_2
from scatter_ops.cuda.recording import launch
from scatter_ops.kernels.routing import count_before_kernel, count_experts_kernel, place_slots_kernel
from scatter_ops.kernels.schedule import schedule_kernel

SORT_BLOCK = 1024


@on_its_device
def route(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """order [N] and offsets [E], both int32. A counting sort: one launch up to 1024 slots, three above."""
    ids = topk_ids_TK.contiguous()
    num_slots = ids.numel()
    order_N = torch.empty(num_slots, dtype=torch.int32, device=ids.device)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    bins = next_power_of_2(num_experts + 1)
    num_blocks = max(1, cdiv(num_slots, SORT_BLOCK))
    counts = before = totals = offsets_E
    if num_blocks > 1:
        counts, before = torch.empty(2, num_blocks, bins, dtype=torch.int32, device=ids.device).unbind(0)
        totals = torch.empty(bins, dtype=torch.int32, device=ids.device)
        launch(count_experts_kernel, (num_blocks,), ids, counts, num_slots, num_experts, bins, SORT_BLOCK)
        columns = min(bins, 16)
        launch(count_before_kernel, (bins // columns,), counts, before, totals, num_blocks, bins, columns, ROWS=128)
    block = SORT_BLOCK if num_blocks > 1 else max(16, next_power_of_2(num_slots))
    launch(
        place_slots_kernel,
        (num_blocks,),
        ids,
        counts,
        before,
        totals,
        order_N,
        offsets_E,
        num_slots,
        num_experts,
        bins,
        block,
        num_blocks == 1,
    )
    return order_N, offsets_E


@dataclass(frozen=True)
class Schedule:
    """Row tiles of a grouped GEMM, the experts by their rows and the inverse of order, on the device.

    max_row_tiles bounds the number of tiles.
    """

    tile_map: Tensor
    max_row_tiles: int
    heaviest_E: Tensor
    inverse_N: Tensor | None


def schedule(order_N: Tensor, offsets_E: Tensor, block_m: int, with_inverse: bool) -> Schedule:
    num_slots, num_experts = order_N.numel(), offsets_E.numel()
    max_row_tiles = cdiv(num_slots, block_m) + num_experts
    tile_map = torch.empty(1 + 3 * max_row_tiles, dtype=torch.int32, device=order_N.device)
    heaviest_E = torch.empty_like(offsets_E)
    inverse_N = torch.empty_like(order_N) if with_inverse else None
    inverse_blocks = cdiv(num_slots, SORT_BLOCK) if with_inverse else 0
    launch(
        schedule_kernel,
        (num_experts + inverse_blocks,),
        order_N,
        offsets_E,
        inverse_N,
        tile_map,
        heaviest_E,
        num_slots,
        num_experts,
        next_power_of_2(num_experts),
        block_m,
        SORT_BLOCK,
    )
    return Schedule(tile_map, max_row_tiles, heaviest_E, inverse_N)


def inverse_order(order_N: Tensor, offsets_E: Tensor) -> Tensor:
    """inverse[slot]: the slot's grouped row, or -1 - row for a sentinel."""
    inverse_N = schedule(order_N, offsets_E, 128, with_inverse=True).inverse_N
    assert inverse_N is not None
    return inverse_N
