"""One output for each choice of a token, weighted and summed afterwards."""

import torch

from tests.zoo.case import Case
from tests.zoo.masks import MaskLoop


class Choices(MaskLoop):
    """Rows are assigned under a mask of one slot."""

    def put(self, y, expert, x, m):
        y[m] = expert(x[m])
        return y

    def one(self, x, chosen):
        """What the experts make of all tokens, each of which has one."""
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = self.put(y, expert, x, chosen == e)
        return y

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            out = out + self.one(x, ids[:, k]) * weights[:, k, None]
        return out


class Skipped(Choices):
    """An expert without a token is skipped, and the output starts empty."""

    def one(self, x, chosen):
        y = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            m = chosen == e
            if not m.any():
                continue
            y[m] = expert(x[m])
        return y


class Copied(Choices):
    """`index_copy_`, and all choices summed at once."""

    def put(self, y, expert, x, m):
        tokens = m.nonzero().squeeze(-1)
        return y.index_copy_(0, tokens, expert(x[tokens]))

    def moe(self, x, ids, weights):
        outputs = [self.one(x, ids[:, k]) for k in range(self.top_k)]
        return (torch.stack(outputs, dim=1) * weights.unsqueeze(-1)).sum(dim=1)


class CopiedAnew(Copied):
    """`index_copy`: a new tensor for each expert."""

    def put(self, y, expert, x, m):
        tokens = torch.where(m)[0]
        return y.index_copy(0, tokens, expert(x[tokens]))


class PutAnew(Copied):
    """`index_put` of positions."""

    def put(self, y, expert, x, m):
        tokens = torch.where(m)[0]
        return y.index_put((tokens,), expert(x[tokens]))


class WeightedInside(MaskLoop):
    """Rows are weighted as they are assigned, `w[m, None]` of `w = weights[:, k]`."""

    def one(self, x, chosen, w):
        """What the experts make of all tokens, each of which has one and one weight."""
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = chosen == e
            y[m] = expert(x[m]) * w[m, None]
        return y

    def moe(self, x, ids, weights):
        outputs = [self.one(x, ids[:, k], weights[:, k]) for k in range(self.top_k)]
        return torch.stack(outputs).sum(dim=0)


class WeightedOfHit(WeightedInside):
    """The same over the experts that a choice has, with `weights[m, k]`; the activation is the experts' own."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            y = torch.zeros_like(x)
            for e in ids[:, k].unique():
                m = ids[:, k] == e
                y[m] = weights[m, k, None] * torch.tanh(self.experts[e](x[m]))
            out += y
        return out


CASES = (
    Case("choices_assigned", Choices, top_k=1, regions=2),
    Case("choices_skipped", Skipped, top_k=1, regions=2),
    Case("choices_copied", Copied, top_k=1, regions=2),
    Case("choices_copied_anew", CopiedAnew, top_k=1, regions=2),
    Case("choices_put_anew", PutAnew, top_k=1, regions=2),
    Case("choices_weighted_inside", WeightedInside, top_k=1, regions=2),
    Case("choices_weighted_of_hit", WeightedOfHit, op="parallel_linear", activation=None),
)
