"""An output of the full size for each expert or choice, which are summed."""

import torch

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class Stacked(MaskLoop):
    """Rows are assigned to zeros of each expert's own; all are stacked and summed."""

    def one(self, x, ids, weights, e):
        """What expert `e` makes of its tokens, and zero for the others."""
        y = torch.zeros_like(x)
        tokens, slots = torch.where(ids == e)
        y[tokens] = self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return y

    def total(self, outputs):
        return torch.stack(outputs).sum(dim=0)

    def moe(self, x, ids, weights):
        return self.total([self.one(x, ids, weights, e) for e in range(self.num_experts)])


class Listed(Stacked):
    """`sum(outputs)`, of tensors to which rows were added."""

    def one(self, x, ids, weights, e):
        y = torch.zeros_like(x)
        tokens, slots = torch.where(ids == e)
        return y.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])

    def total(self, outputs):
        return sum(outputs)


class AddedInLoop(Stacked):
    """Each output is added to what was there before, here what all tokens get; one without tokens is skipped."""

    def moe(self, x, ids, weights):
        out = torch.tanh(x)
        for e, expert in enumerate(self.experts):
            y, m = torch.zeros_like(x), (ids == e).any(-1)
            if not m.any():
                continue
            y[m] = expert(x[m]) * (weights * (ids == e)).sum(-1)[m, None]
            out = out + y
        return out


class PutAnew(Stacked):
    """`index_copy` makes a new tensor; the sum is over the last dim of a stack."""

    def one(self, x, ids, weights, e):
        tokens, slots = torch.where(ids == e)
        rows = torch.relu(self.experts[e](x[tokens])) * weights[tokens, slots, None]
        return torch.zeros_like(x).index_copy(0, tokens, rows)

    def total(self, outputs):
        return torch.stack(outputs, dim=-1).sum(-1)


class OneBuffer(MaskLoop):
    """Zeros [E, T, D] hold all outputs."""

    def moe(self, x, ids, weights):
        y = x.new_zeros(self.num_experts, *x.shape)
        for e, expert in enumerate(self.experts):
            m, weight = (ids == e).any(-1), (weights * (ids == e)).sum(-1)
            y[e, m] = expert(x[m]) * weight[m, None]
        return y.sum(dim=0)


class BufferBehindTokens(MaskLoop):
    """Zeros [T, E, D], to which each expert adds its rows."""

    def moe(self, x, ids, weights):
        y = x.new_zeros(x.shape[0], self.num_experts, D)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y[tokens, e] += expert(x[tokens]) * weights[tokens, slots, None]
        return y.sum(1)


class BufferOfChoices(MaskLoop):
    """Zeros [T, K, D] hold what each choice gives."""

    def moe(self, x, ids, weights):
        y = x.new_zeros(x.shape[0], self.top_k, D)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                m = ids[:, k] == e
                y[m, k] = weights[m, k, None] * expert(x[m])
        return y.sum(1)


CASES = (
    Case("summed_stacked", Stacked),
    Case("summed_listed", Listed),
    Case("summed_in_loop", AddedInLoop),
    Case("summed_put_anew", PutAnew, op="parallel_linear", activation=None),
    Case("summed_one_buffer", OneBuffer),
    Case("summed_buffer_behind_tokens", BufferBehindTokens),
    Case("summed_buffer_of_choices", BufferOfChoices),
)
