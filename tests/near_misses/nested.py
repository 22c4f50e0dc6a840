"""Loops around a loop over experts, what comes after it, and loops whose iterations others see."""

import random

import torch

from tests.near_misses.common import Loop, NearMiss, RangeLoop, StackedLoop, hits
from tests.zoo.common import E


class EveryExpertOnEachRow(Loop):
    """Rows of each expert's tokens go through all experts."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            for other in range(self.num_experts):
                out.index_add_(0, tokens, self.experts[other](x[tokens]) * weights[tokens, slots, None])
        return out


class RepeatedHits(StackedLoop):
    """As many rounds as there are experts."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for _ in range(self.num_experts):
            for e in hit:
                e = e[0]
                slots, tokens = torch.where(mask[e])
                out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class RepeatedNumbers(Loop):
    """Rounds around a loop that is unrolled."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for _ in range(self.num_experts):
            for e in tuple(range(E)):
                tokens, slots = torch.where(ids == e)
                out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class LastExpertAgain(RangeLoop):
    """What the loop leaves in its variable is the last expert, who adds rows to an output of their own."""

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, 1)
        _, weights, ids = self.gate(x)
        out, again, others = torch.zeros_like(x), torch.zeros_like(x), (ids + 1) % E
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        tokens, slots = torch.where(others == e)
        again.index_add_(0, tokens, x[tokens] * weights[tokens, slots, None])
        return out, again


class WorksInGenerator(Loop):
    """A generator runs the experts, whoever counts its items is another function."""

    def each(self, x, ids, weights, out):
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            yield e

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        return out * self.consumer(self.each(x, ids, weights, out))

    def consumer(self, iterations):
        count = 0
        for _ in iterations:
            count += 1
        return count


class WorksInGeneratorOfHits(WorksInGenerator):
    def each(self, x, ids, weights, out):
        mask = torch.nn.functional.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            yield e


class SkipsInGenerator(WorksInGenerator):
    """Only experts with a token are handed on."""

    def each(self, x, ids, weights, out):
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens) == 0:
                continue
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            yield e


class DrawsInPython(StackedLoop):
    """Python's own random numbers, one an expert that was hit."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            factor = random.uniform(0.5, 1.0)
            out.index_add_(0, tokens, self.expert(x[tokens], e) * factor * weights[tokens, slots, None])
        return out, random.random()


STATE, OTHER = "loop_changes_no_python_state", "no_other_loop_holds_the_region"

MISSES = (
    NearMiss("range_every_expert_on_each_row", "every_expert_is_covered", EveryExpertOnEachRow, at_first=OTHER),
    NearMiss("hit_repeated", "every_expert_is_covered", RepeatedHits, at_first=OTHER),
    NearMiss("range_repeated", "every_expert_is_covered", RepeatedNumbers, at_first=OTHER),
    NearMiss("range_last_expert_again", None, LastExpertAgain, may_rewrite=True, at_first=OTHER),
    NearMiss("range_in_generator", None, WorksInGenerator, may_rewrite=True),
    NearMiss("hit_in_generator", STATE, WorksInGeneratorOfHits),
    NearMiss("range_skips_in_generator", STATE, SkipsInGenerator),
    NearMiss("hit_draws_in_python", STATE, DrawsInPython),
)
