"""Guards with another side for experts without tokens, which is run or may be."""

from tests.near_misses.common import NearMiss
from tests.zoo.otherwise import TouchedInTraining, TouchedOnDemand


class OnDemand(TouchedOnDemand):
    """The flag is set."""

    def __init__(self):
        super().__init__()
        self.touches = True


class SetInForward(TouchedOnDemand):
    """The flag is set in the same forward, before the loop."""

    def moe(self, x, ids, weights):
        self.touches = True
        return super().moe(x, ids, weights)


class Scaled(TouchedInTraining):
    """An expert without tokens adds to the first token in training."""

    def touch(self, out, expert):
        out[0, 0] += 0.1 * sum(parameter.sum() for parameter in expert.parameters())


GUARD = "guards_only_skip_empty_experts"

MISSES = (
    NearMiss("otherwise_in_training", GUARD, TouchedInTraining),
    NearMiss("otherwise_on_demand", GUARD, OnDemand),
    NearMiss("otherwise_set_in_forward", GUARD, SetInForward),
    NearMiss("otherwise_scaled", GUARD, Scaled),
)
