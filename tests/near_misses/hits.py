"""Lists of experts that are not those with a token, or whose numbers do more than to pick an expert."""

import torch

from tests.near_misses.common import Loop, NearMiss, hits
from tests.zoo.common import E


class HitList(Loop):
    """A loop over what `listed` gives; subclasses change one step."""

    def listed(self, ids, mask):
        return hits(mask).flatten()

    def scale(self, e):
        return 1

    def forward(self, hidden_states):
        x, ids, weights, mask, out = self.begin(hidden_states)
        for e in self.listed(ids, mask):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens]) * self.scale(e)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class UniqueOfFirstSlot(HitList):
    """The experts of first slots alone."""

    def listed(self, ids, mask):
        return ids[:, 0].unique()


class UniqueBelow(HitList):
    """Ids are changed before they are listed."""

    def listed(self, ids, mask):
        return ids.clamp(max=E - 2).unique()


class SeveralTokens(HitList):
    """Experts with more than one token."""

    def listed(self, ids, mask):
        return torch.where(mask.sum(dim=(-1, -2)) > 1)[0]


class FirstSkipped(HitList):
    """The first expert with a token is left out."""

    def listed(self, ids, mask):
        return ids.unique()[1:]


class Unpacked(Loop):
    """The number that was unpacked scales the rows."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for (e,) in hits(mask):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * (1 + e) * weights[tokens, slots, None])
        return out


class Numbers(Loop):
    """Python numbers of the experts with a token; what else is done with them."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        seen = self.start()
        for e in hits(mask).flatten().tolist():
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            seen = self.see(seen, e)
        return self.end(out, seen)

    def start(self):
        return 0

    def end(self, out, seen):
        return out * (1 + seen)


class LastNumber(Numbers):
    """The last expert with a token."""

    def see(self, seen, e):
        return e


class Counted(Numbers):
    """How many experts have a token."""

    def see(self, seen, e):
        return seen + 1


class Collected(Numbers):
    """All of them in a list."""

    def start(self):
        return []

    def see(self, seen, e):
        return [*seen, e]

    def end(self, out, seen):
        return out * len(seen)


class NumberScales(Loop):
    """The number scales the rows."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask).flatten().tolist():
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * (1 + e) * weights[tokens, slots, None])
        return out


class StopsEarly(Loop):
    """The loop ends at the last but one expert."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask).flatten().tolist():
            if e == E - 2:
                break
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


OVER_HITS, STATE = "loop_is_over_the_hit_experts", "loop_changes_no_python_state"

MISSES = (
    NearMiss("hits_unique_of_first_slot", "guards_are_of_the_same_expert", UniqueOfFirstSlot),
    NearMiss("hits_unique_below", OVER_HITS, UniqueBelow),
    NearMiss("hits_several_tokens", OVER_HITS, SeveralTokens),
    NearMiss("hits_first_skipped", OVER_HITS, FirstSkipped),
    NearMiss("hits_unpacked", "operations_are_known", Unpacked),
    NearMiss("hits_last_number", STATE, LastNumber),
    NearMiss("hits_counted", STATE, Counted),
    NearMiss("hits_collected", STATE, Collected),
    NearMiss("hits_number_scales", "bodies_are_isomorphic", NumberScales),
    NearMiss("hits_stop_early", "loop_runs_to_its_end", StopsEarly),
)
