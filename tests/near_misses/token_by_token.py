"""Experts whose numbers Python reads from tensors: those of tokens that are computed one after the other, or all."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.masks import MaskLoop

FEW = 3


class TokenByToken(MaskLoop):
    """The plainest such loop; a subclass says how it comes by the experts of a token."""

    def experts_of(self, ids, t):
        return [ids[t, k].item() for k in range(self.top_k)]

    def moe(self, x, ids, weights):
        rows = []
        for t in range(FEW):
            chosen = self.experts_of(ids, t)
            rows.append(sum(weights[t, k] * self.experts[e](x[t]) for k, e in enumerate(chosen)))
        return torch.cat([torch.stack(rows), x[FEW:]])


class AsIntegers(TokenByToken):
    def experts_of(self, ids, t):
        return [int(e) for e in ids[t]]


class AsAList(TokenByToken):
    def experts_of(self, ids, t):
        return ids.tolist()[t]


class AsIndices(TokenByToken):
    """The list of experts is indexed by tensors."""

    def experts_of(self, ids, t):
        return [ids[t, k] for k in range(self.top_k)]


class TensorAsNumber(MaskLoop):
    """A loop over experts whose numbers are tensors that Python must read: the list of experts asks for each."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in torch.arange(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


MISSES = (
    NearMiss("token_by_token", "loop_is_over_the_experts", TokenByToken),
    NearMiss("token_by_token_integers", "loop_is_over_the_experts", AsIntegers),
    NearMiss("token_by_token_list", "loop_is_over_the_experts", AsAList),
    NearMiss("token_by_token_indices", "loop_is_over_the_experts", AsIndices),
    NearMiss("expert_by_expert_tensors", "loop_is_over_the_experts", TensorAsNumber),
)
