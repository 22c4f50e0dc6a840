"""Routing: a stable counting sort of slots by expert, without atomics on global memory.

    counts[b, e]  slots of expert e in block b                         (count_experts_kernel)
    before[b, e]  slots of expert e in the blocks before b             (count_before_kernel)
    order[starts[e] + before[b, e] + rank in block] = slot             (place_slots_kernel)

Ids outside 0..E-1 (sentinels) form one more bin, so they come last.
Legend: N slots, E experts.
"""

import triton
import triton.language as tl


@triton.jit
def _load_bins(topk_ids_ptr, slots, num_slots, NUM_EXPERTS: tl.constexpr):
    ids = tl.load(topk_ids_ptr + slots, mask=slots < num_slots, other=-1)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def count_experts_kernel(
    topk_ids_ptr, counts_ptr, num_slots, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    bins = _load_bins(topk_ids_ptr, block * BLOCK + tl.arange(0, BLOCK), num_slots, NUM_EXPERTS)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), tl.histogram(bins, BINS))


@triton.jit(do_not_specialize=["num_blocks"])
def count_before_kernel(
    counts_ptr, before_ptr, totals_ptr, num_blocks, BINS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    running = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, num_blocks, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        counts = tl.load(counts_ptr + rows * BINS + columns, mask=rows < num_blocks, other=0)
        tl.store(before_ptr + rows * BINS + columns, running + tl.cumsum(counts, 0) - counts, mask=rows < num_blocks)
        running += tl.sum(counts, 0)
    tl.store(totals_ptr + columns, running)


@triton.jit(do_not_specialize=["num_slots"])
def place_slots_kernel(
    topk_ids_ptr,
    counts_ptr,
    before_ptr,
    totals_ptr,
    order_ptr,
    offsets_ptr,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    expert = _load_bins(topk_ids_ptr, block * BLOCK + lane, num_slots, NUM_EXPERTS)
    if SINGLE_BLOCK:
        counts = tl.histogram(expert, BINS)
        before = tl.zeros([BINS], tl.int32)
        totals = counts
    else:
        counts = tl.load(counts_ptr + block * BINS + bins)
        before = tl.load(before_ptr + block * BINS + bins)
        totals = tl.load(totals_ptr + bins)
    ends = tl.cumsum(totals, 0)
    local_starts = tl.cumsum(counts, 0) - counts

    # The lane number in the low digits makes the sort stable.
    keys = tl.sort(expert * BLOCK + lane)
    slots = block * BLOCK + keys % BLOCK
    position = tl.gather(ends - totals + before - local_starts, keys // BLOCK, 0) + lane
    tl.store(order_ptr + position, slots, mask=slots < num_slots)
    if block == 0:
        tl.store(offsets_ptr + bins, ends, mask=bins < NUM_EXPERTS)
