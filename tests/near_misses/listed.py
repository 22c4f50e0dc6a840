"""Almost the positions of an expert's slots, picked from those of all."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.listed import AllAtOnce


class Others(AllAtOnce):
    """Each expert takes the slots of all others."""

    def mine(self, experts, e):
        return experts != e


class UpTo(AllAtOnce):
    """Each expert takes its slots and those of the experts before it."""

    def mine(self, experts, e):
        return experts <= e


class TwoOrders(AllAtOnce):
    """Tokens in the order of slots, slots in the order of tokens: weights of other tokens."""

    def listed(self, ids):
        mask = F.one_hot(ids, E)
        experts, _, tokens = torch.where(mask.permute(2, 1, 0))
        _, _, slots = torch.where(mask.permute(2, 0, 1))
        return experts, slots, tokens


class AnotherList(AllAtOnce):
    """The experts are those of other ids."""

    def listed(self, ids):
        _, slots, tokens = super().listed(ids)
        others, _, _ = super().listed(ids.flip(0))
        return others, slots, tokens


class SlotsAsTokens(AllAtOnce):
    """The positions of slots are taken for tokens."""

    def listed(self, ids):
        experts, slots, tokens = super().listed(ids)
        return experts, tokens.clamp(max=1), slots


MISSES = (
    NearMiss("listed_others", "loop_has_a_known_form", Others),
    NearMiss("listed_up_to", "loop_has_a_known_form", UpTo),
    NearMiss("listed_two_orders", "loop_has_a_known_form", TwoOrders),
    NearMiss("listed_another_list", "loop_has_a_known_form", AnotherList),
    NearMiss("listed_slots_as_tokens", "loop_has_a_known_form", SlotsAsTokens),
)
