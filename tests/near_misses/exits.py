"""Loops that are left early, experts that are skipped, branches that do more than to skip one without tokens."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import Loop, NearMiss, RangeLoop, StackedLoop, hits
from tests.zoo.common import D, E


class BreakAtTwo(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            if e == 2:
                break
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class BreakAtTwoHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            if e == 2:
                break
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class SkipsTwoHit(Loop):
    """`continue` on a real expert, not on the sentinel."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            e = e[0]
            if e == 2:
                continue
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class BreakWhenEmpty(Loop):
    """The first expert without tokens ends the loop."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() < 8:
                break
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ReturnInside(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            if e == 1:
                return out
        return out


class ElseBranch(Loop):
    """An expert without tokens changes the result."""

    def __init__(self):
        super().__init__(num_experts=6, top_k=1)

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            chosen = ids == e
            if chosen.any():
                tokens, slots = torch.where(chosen)
                out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            else:
                out = out + 1
        return out


class CountGuard(Loop):
    """Experts with few tokens are skipped."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.shape[0] < 12:
                continue
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class CountGuardHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            if tokens.numel() > 11:
                out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class AllGuard(Loop):
    """`all` where `any` was meant."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            chosen = ids == e
            if not chosen.all():
                continue
            tokens, slots = torch.where(chosen)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out + x


class GuardOfAnother(Loop):
    """The guard looks at the next expert's tokens."""

    def __init__(self):
        super().__init__(num_experts=6, top_k=1)

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            chosen = ids == e
            if (ids == (e + 1) % self.num_experts).sum() > 4:
                tokens, slots = torch.where(chosen)
                out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ForElse(Loop):
    """The else of a for without break always runs."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        else:
            out = out * 2
        return out


class ReturnsFromHelper(StackedLoop):
    """The helper that holds the loop returns from within it."""

    def run(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
            return out
        return out

    def forward(self, hidden_states):
        return self.run(hidden_states) * 2


class BreaksAfterFirst(Loop):
    """Experts that are modules of their own: one iteration an expert, and a break."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            break
        return out


class IndexAfterHits(Loop):
    """The last hit expert's number indexes a list after the loop."""

    def __init__(self):
        super().__init__()
        self.scales = [1.0, 2.0, 3.0, 4.0]

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * self.scales[e]


class SentinelAfterWork(StackedLoop):
    """`continue` on the class of no expert comes after its tokens were added."""

    def __init__(self):
        super().__init__(classes=E + 1)

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states, classes=E + 1)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, x[tokens] * weights[tokens, slots, None])
            if e == self.num_experts:
                continue
        return out


class LastOnly(RangeLoop):
    """Every expert adds to the zeros, and only the last sum is kept."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            result = out.index_add(0, tokens, self.value(x, weights, tokens, slots, e))
        return result


class LastOnlyHit(StackedLoop):
    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            result = out.index_add(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return result


class GuardOfOtherIds(RangeLoop):
    """An expert is skipped where other ids don't name it."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        other = F.one_hot(ids.clamp(max=1), self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            if not other[e].any():
                continue
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out


MISSES = (
    NearMiss("range_break_at_two", "every_expert_is_covered", BreakAtTwo, may_rewrite=True),
    NearMiss("hit_break_at_two", "loop_runs_to_its_end", BreakAtTwoHit),
    NearMiss("hit_skips_two", "every_expert_is_covered", SkipsTwoHit),
    NearMiss("range_break_when_empty", "guards_only_skip_empty_experts", BreakWhenEmpty),
    NearMiss("hit_return_inside", "loop_runs_to_its_end", ReturnInside),
    NearMiss("range_else_branch", "guards_only_skip_empty_experts", ElseBranch),
    NearMiss("range_count_guard", "guards_only_skip_empty_experts", CountGuard),
    NearMiss("hit_count_guard", "guards_only_skip_empty_experts", CountGuardHit),
    NearMiss("range_all_guard", "guards_only_skip_empty_experts", AllGuard),
    NearMiss("range_guard_of_another", "guards_only_skip_empty_experts", GuardOfAnother),
    NearMiss("hit_for_else", "loop_has_a_known_form", ForElse, may_rewrite=True),
    NearMiss("hit_returns_from_helper", "loop_runs_to_its_end", ReturnsFromHelper),
    NearMiss("hit_breaks_after_first", "loop_runs_to_its_end", BreaksAfterFirst),
    NearMiss("hit_index_after", "no_intermediate_escapes", IndexAfterHits),
    NearMiss("hit_sentinel_after_work", "loop_has_a_known_form", SentinelAfterWork),
    NearMiss("range_last_only", "additions_follow_each_other", LastOnly),
    NearMiss("hit_last_only", "additions_follow_each_other", LastOnlyHit),
    NearMiss("range_guard_of_other_ids", "guards_are_of_the_same_expert", GuardOfOtherIds),
)
