"""Accumulators that do not start at zero, are read, aliased, assigned, or are not sums."""

import torch

from tests.near_misses.common import Loop, NearMiss, hits
from tests.zoo.common import TOKENS, D
from tests.zoo.starts import CastEachTime, CastEachTimeOfHit


class StartHasTwoNames(Loop):
    """The start is read after the loop by another name."""

    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        start = x * 2
        seen, out = start.view(-1), start
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out + seen.view_as(out).cos()


class StartWritten(Loop):
    """Additions that aren't in place start from a tensor that is written to before they have ended."""

    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        start = x * 2
        out = start
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out = out.index_add(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            start.detach().mul_(0.5)
        return out + start.sin()


class ZerosWritten(Loop):
    """Additions that aren't in place start from zeros that were written to first."""

    def write(self, out):
        out[:, 0] = 1.0

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        self.write(out)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out = out.index_add(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ZerosScattered(ZerosWritten):
    def write(self, out):
        out.scatter_(1, torch.zeros(len(out), 1, dtype=torch.long), 1.0)


class PartlyInPlace(Loop):
    """The first addition writes to the start, which is read after the loop; the others don't."""

    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        start = x * 2
        out = start
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            value = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out = out.index_add(0, tokens, value) if e else out.index_add_(0, tokens, value)
        return out + start.cos()


class AliasesInput(Loop):
    """Adds into x, which later experts read."""

    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        out = x = x * 1
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class AliasesInputHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        x = x * 1
        out = x.view(-1, D)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ReadInside(Loop):
    """An expert sees what the experts before it added."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            state = x[tokens] + out[tokens]
            out = out.index_add(0, tokens, self.experts[e](state) * weights[tokens, slots, None])
        return out


class ReadInsideHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            state = x[tokens] + out[tokens]
            out = out.index_add(0, tokens, self.experts[e](state) * weights[tokens, slots, None])
        return out


class DecaysInside(Loop):
    """Scaled once per expert: the order of the experts matters."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out = out * 0.5
            out = out.index_add(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class DecaysInsideHit(Loop):
    """Scaled once per expert that was hit."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.mul_(0.5)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class InPlaceOnInput(Loop):
    """x changes under the later experts."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        x = x * 1
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            state = x[tokens]
            out.index_add_(0, tokens, self.experts[e](state) * weights[tokens, slots, None])
            x.index_fill_(0, tokens, 0.25)
        return out


class InPlaceOnInputHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        x = x * 1
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            state = x[tokens]
            out.index_add_(0, tokens, self.experts[e](state) * weights[tokens, slots, None])
            x.index_fill_(0, tokens, 0.25)
        return out


class InPlaceOnWeights(Loop):
    """The router's weights fade with every expert."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        weights = weights * 1
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            weights.mul_(0.5)
        return out


class InPlaceOnMask(Loop):
    """An expert takes its tokens away from the next."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        mask = mask.clone()
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            mask[:, :, tokens] = 0
        return out


class InPlaceOnMaskHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        mask = mask.clone()
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            mask[:, :, tokens] = 0
        return out


class InPlaceOnIds(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        ids = ids.clone()
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            ids[tokens] = -1
        return out


class InBuffer(Loop):
    """The accumulator is a buffer which the caller can see."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(TOKENS, D))

    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        with torch.no_grad():
            for e in range(self.num_experts):
                slots, tokens = torch.where(mask[e])
                self.total.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return self.total * x


class InBufferHit(InBuffer):
    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        with torch.no_grad():
            for e in hits(mask):
                slots, tokens = torch.where(mask[e].squeeze(0))
                self.total.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return self.total * x


class Alpha(Loop):
    """index_add_ with alpha."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None], alpha=2)
        return out


class AlphaByExpert(Loop):
    """index_add_ with another alpha per expert."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None], alpha=1 + e)
        return out


class Maximum(Loop):
    """The largest output wins."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out = out.index_reduce(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None], "amax")
        return out


class MinusEquals(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] -= self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class TimesEquals(Loop):
    """A product over the experts."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        out = out + 1
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] *= self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class Assigned(Loop):
    """With K = 2 the later expert overwrites the earlier."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] = self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class AssignedHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out[tokens] = self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class TwoAccumulators(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        squares = torch.zeros_like(x)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out.index_add_(0, tokens, y)
            squares.index_add_(0, tokens, y * y)
        return out, squares


class RestartsHalfWay(Loop):
    """The sum is thrown away after two experts."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            if e == 1:
                out = torch.zeros_like(x)
        return out


class Copied(CastEachTimeOfHit):
    """Each iteration goes on from a copy."""

    def cast(self, out, y):
        return out.to(y.dtype, copy=True)


class PartCast(CastEachTime):
    """The dtype is the same, but what is cast is a view of the output."""

    def cast(self, out, y):
        return out[: len(out)].to(y.dtype)


NOT_READ = "accumulator_is_not_read_inside"

MISSES = (
    NearMiss("hit_start_has_two_names", NOT_READ, StartHasTwoNames),
    NearMiss("hit_output_copied", "accumulator_may_be_added_to", Copied),
    NearMiss("range_output_sliced", "accumulator_may_be_added_to", PartCast),
    NearMiss("range_start_written", "nothing_is_written_inside", StartWritten),
    NearMiss("range_zeros_written", "accumulator_may_be_added_to", ZerosWritten),
    NearMiss("range_zeros_scattered", "accumulator_may_be_added_to", ZerosScattered),
    NearMiss("range_partly_in_place", "additions_follow_each_other", PartlyInPlace),
    NearMiss("range_aliases_input", NOT_READ, AliasesInput),
    NearMiss("hit_aliases_input", "accumulator_may_be_added_to", AliasesInputHit),
    NearMiss("range_read_inside", "bodies_are_isomorphic", ReadInside, at_first=NOT_READ),
    NearMiss("hit_read_inside", "bodies_are_isomorphic", ReadInsideHit, at_first=NOT_READ),
    NearMiss("range_decays_inside", "accumulator_may_be_added_to", DecaysInside, may_rewrite=True),
    NearMiss("hit_decays_inside", "accumulator_may_be_added_to", DecaysInsideHit),
    NearMiss("range_in_place_on_input", "no_intermediate_escapes", InPlaceOnInput),
    NearMiss("hit_in_place_on_input", "no_intermediate_escapes", InPlaceOnInputHit),
    NearMiss("range_in_place_on_weights", "nothing_is_written_inside", InPlaceOnWeights),
    NearMiss("range_in_place_on_mask", "no_intermediate_escapes", InPlaceOnMask),
    NearMiss("hit_in_place_on_mask", "no_intermediate_escapes", InPlaceOnMaskHit),
    NearMiss("range_in_place_on_ids", "no_intermediate_escapes", InPlaceOnIds),
    NearMiss("range_buffer_accumulator", "accumulator_may_be_added_to", InBuffer),
    NearMiss("hit_buffer_accumulator", "accumulator_may_be_added_to", InBufferHit),
    NearMiss("range_alpha", "accumulation_is_a_plain_sum", Alpha, may_rewrite=True),
    NearMiss("range_alpha_by_expert", "accumulation_is_a_plain_sum", AlphaByExpert),
    NearMiss("range_maximum", "loop_has_a_known_form", Maximum),
    NearMiss("range_minus_equals", "accumulation_is_a_plain_sum", MinusEquals, may_rewrite=True),
    NearMiss("range_times_equals", "accumulation_is_a_plain_sum", TimesEquals),
    NearMiss("range_assigned", "assignments_overwrite_nothing", Assigned),
    NearMiss("hit_assigned", "assignments_overwrite_nothing", AssignedHit),
    NearMiss("range_two_accumulators", "no_intermediate_escapes", TwoAccumulators, may_rewrite=True),
    NearMiss("range_restarts_half_way", "every_expert_is_covered", RestartsHalfWay, may_rewrite=True),
)
