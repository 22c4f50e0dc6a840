"""Switch layers whose lists of tokens are not those of the experts that compute them."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.switch_lists import FeedForward, SwitchLists


class Plain(SwitchLists):
    """Without dropout, which would break a rule of its own."""

    def __init__(self):
        super().__init__(lambda: FeedForward(p=0.0))


class RandomlyDropped(Plain):
    """Beyond its capacity an expert drops tokens, drawn at random."""

    def lists(self, routes):
        lists, capacity = super().lists(routes), 6
        for e in range(self.n_experts):
            if len(lists[e]) > capacity:
                lists[e] = lists[e][torch.randperm(len(lists[e]))][:capacity]
        return lists


class FirstComeFirstServed(Plain):
    """Beyond its capacity an expert drops the last tokens."""

    def lists(self, routes):
        return [tokens[:6] for tokens in super().lists(routes)]


class LastLeftOut(Plain):
    """The last expert's tokens keep zeros."""

    def assign(self, out, lists, outputs):
        for e in range(self.n_experts - 1):
            out[lists[e], :] = outputs[e]
        return out


class FirstColumnOnly(Plain):
    """Half of the features is assigned."""

    def assign(self, out, lists, outputs):
        for e in range(self.n_experts):
            out[lists[e], :8] = outputs[e][:, :8]
        return out


class AssignedTwice(Plain):
    """What was assigned is assigned again, halved."""

    def assign(self, out, lists, outputs):
        for half in (1.0, 0.5):
            for e in range(self.n_experts):
                out[lists[e], :] = outputs[e] * half
        return out


class OutputsReturned(Plain):
    """The first expert's rows are added to what all tokens get."""

    def assign(self, out, lists, outputs):
        return super().assign(out, lists, outputs) + outputs[0].mean(0)


class LengthScales(Plain):
    """An expert's rows are divided by their number."""

    def outputs(self, x, lists):
        return [rows / max(len(rows), 1) for rows in super().outputs(x, lists)]


MISSES = (
    NearMiss("switch_lists_randomly_dropped", "loop_can_be_traced", RandomlyDropped),
    NearMiss("switch_lists_first_come", "loop_has_a_known_form", FirstComeFirstServed),
    NearMiss("switch_lists_last_left_out", "loop_has_a_known_form", LastLeftOut),
    NearMiss("switch_lists_half_assigned", "loop_has_a_known_form", FirstColumnOnly),
    NearMiss("switch_lists_assigned_twice", "every_expert_is_covered", AssignedTwice),
    NearMiss("switch_lists_outputs_returned", "no_intermediate_escapes", OutputsReturned),
    NearMiss("switch_lists_length_scales", "operations_are_known", LengthScales),
)
