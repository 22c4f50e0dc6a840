"""Programs that look like Mixture-of-Experts loops and must be left exactly as they are."""

from tests.near_misses import accumulators, bodies, escapes, experts, indices, iterations, modes, slots
from tests.near_misses.common import NearMiss

NEAR_MISSES: tuple[NearMiss, ...] = (
    *experts.MISSES,
    *bodies.MISSES,
    *accumulators.MISSES,
    *escapes.MISSES,
    *indices.MISSES,
    *modes.MISSES,
    *iterations.MISSES,
    *slots.MISSES,
)

__all__ = ["NEAR_MISSES", "NearMiss"]
