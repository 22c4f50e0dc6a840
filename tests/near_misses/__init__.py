"""Programs that look like Mixture-of-Experts loops and must be left exactly as they are."""

from tests.near_misses import (
    accumulators,
    bodies,
    boolean_masks,
    counts,
    dense,
    dense_modules,
    dtypes,
    escapes,
    exits,
    experts,
    flat,
    gathered,
    indices,
    iterations,
    masks,
    modes,
    numbers,
    python_state,
    segments,
    shapes,
    slots,
    writes,
)
from tests.near_misses.common import NearMiss

NEAR_MISSES: tuple[NearMiss, ...] = (
    *experts.MISSES,
    *bodies.MISSES,
    *shapes.MISSES,
    *dtypes.MISSES,
    *accumulators.MISSES,
    *writes.MISSES,
    *escapes.MISSES,
    *exits.MISSES,
    *indices.MISSES,
    *masks.MISSES,
    *boolean_masks.MISSES,
    *flat.MISSES,
    *counts.MISSES,
    *segments.MISSES,
    *modes.MISSES,
    *numbers.MISSES,
    *iterations.MISSES,
    *python_state.MISSES,
    *slots.MISSES,
    *gathered.MISSES,
    *dense.MISSES,
    *dense_modules.MISSES,
)

__all__ = ["NEAR_MISSES", "NearMiss"]
