"""Almost a loop that uses the expert's number, or a one-hot tensor of which tokens were dropped."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import Block, D, E
from tests.zoo.numbers import Dropped, DroppedChoice, DroppedListed, DroppedSequences, hits


class Counted(Dropped):
    """A token counts as often as there are tokens before it: no mask."""

    def kept(self, one_hot):
        return one_hot * torch.cumsum(one_hot, dim=-2)


class BroadcastOverExperts(Dropped):
    """A mask with a dim of its own: two rows for each token."""

    def kept(self, one_hot):
        return (one_hot * torch.ones(2, 1, 1, 1, dtype=torch.bool, device=one_hot.device))[0]


class TwoChoices(Dropped):
    """Two one-hot tensors added: a token may have two experts, or one of them twice."""

    def chosen(self, logits):
        return super().chosen(logits) + self.kept(F.one_hot(logits.argmin(dim=-1), E))


class ChoiceCounted(DroppedChoice):
    """A token counts as often as there are tokens of its expert before it: no mask."""

    def kept(self, one_hot):
        return one_hot * torch.cumsum(one_hot, dim=0)


class ChoiceAndNext(DroppedChoice):
    """A token goes to the next expert, too."""

    def kept(self, one_hot):
        return super().kept(one_hot) + super().kept(one_hot.roll(1, dims=-1))


class ChoicesInOrder(DroppedChoice):
    """Two experts a token, of which the capacity may drop one."""

    def forward(self, hidden_states):
        x = hidden_states.view(-1, D)
        weights, ids = self.gate(x).softmax(dim=-1).topk(2, dim=-1)
        chosen = self.kept(F.one_hot(ids, E)).permute(2, 1, 0)
        return self.experts(x, chosen, weights).view(hidden_states.shape)


class ListedByPlace(DroppedListed):
    """Dims are swapped before the sum: other experts than those that were hit (switch_transformers 4.45)."""

    def listed(self, mask):
        return mask.transpose(1, 2).reshape(-1, E).sum(dim=0).nonzero(as_tuple=True)[0].tolist()


class ListedInPart(DroppedListed):
    """The first expert that was hit does nothing."""

    def listed(self, mask):
        return super().listed(mask)[1:]


class ListCounted(DroppedListed):
    """How many experts were hit is added to their rows."""

    def run(self, x, chosen):
        numbers = self.listed(chosen.bool())
        return super().run(x, chosen) + len(numbers)


class ListExtended(DroppedListed):
    """Expert 0 runs whether it was hit or not, perhaps twice."""

    def listed(self, mask):
        numbers = super().listed(mask)
        numbers.append(0)
        return numbers

    def run(self, x, chosen):
        out, mask = x.clone(), chosen.bool()
        for e in self.listed(mask):
            out[mask[:, :, e]] = self.experts[f"expert_{e}"](out[mask[:, :, e]])
        return out


class ListEnumerated(DroppedListed):
    """An expert's place among those that were hit scales its rows."""

    def run(self, x, chosen):
        out, mask = torch.zeros_like(x), chosen.bool()
        numbers = self.listed(mask)
        for place, e in enumerate(numbers):
            out[mask[:, :, e]] = self.experts[f"expert_{e}"](x[mask[:, :, e]]) * place
        return out


class CountedSequences(DroppedSequences):
    """A token counts as often as there are tokens before it: no mask."""

    def kept(self, one_hot):
        return one_hot * torch.cumsum(one_hot, dim=-2)


class MaskOfNextExpert(DroppedSequences):
    """Rows that one expert is given are written where another's belong."""

    def run(self, x, chosen):
        out = x.clone()
        for e, expert in enumerate(self.experts.values()):
            rows = chosen[:, :, e].bool()
            counted = rows.sum() - chosen[:, :, (e + 1) % E].bool().sum()
            out[rows] = expert(x[rows]) * counted
        return out


class NumberKept(Block):
    """The numbers of the experts that were hit are kept on the module."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        self.hit = []
        for e in hits(mask):
            self.hit.append(e.item())
            slots, tokens = torch.where(mask[e[0]])
            out.index_add_(0, tokens, self.experts[e[0]](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class NumberInConstant(Block):
    """Each expert's rows are scaled by its number."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e[0]])
            y = self.experts[e[0]](x[tokens]) * float(f"0.{e[0]}")
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out.view_as(hidden_states)


MISSES = (
    NearMiss("hit_dropped_counted", "loop_is_over_the_hit_experts", Counted),
    NearMiss("hit_dropped_broadcast", "loop_is_over_the_hit_experts", BroadcastOverExperts),
    NearMiss("hit_dropped_two_choices", "loop_is_over_the_hit_experts", TwoChoices),
    NearMiss("dropped_choice_counted", "loop_is_over_the_hit_experts", ChoiceCounted),
    NearMiss("dropped_choice_and_next", "loop_is_over_the_hit_experts", ChoiceAndNext),
    NearMiss("dropped_choices_in_order", "loop_is_over_the_hit_experts", ChoicesInOrder),
    NearMiss("list_by_place", "loop_is_over_the_hit_experts", ListedByPlace),
    NearMiss("list_in_part", "loop_is_over_the_hit_experts", ListedInPart),
    NearMiss("list_counted", "no_intermediate_escapes", ListCounted),
    NearMiss("list_extended", "loop_is_over_the_hit_experts", ListExtended),
    NearMiss("list_enumerated", "operations_are_known", ListEnumerated),
    NearMiss("range_sequences_counted", "loop_has_a_known_form", CountedSequences),
    NearMiss("range_sequences_next_expert", "bodies_are_isomorphic", MaskOfNextExpert),
    NearMiss("hit_number_kept", "loop_changes_no_python_state", NumberKept),
    NearMiss("hit_number_in_constant", "bodies_are_isomorphic", NumberInConstant),
)
