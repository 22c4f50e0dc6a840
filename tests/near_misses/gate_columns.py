"""Experts that take the tokens whose gate is open, almost."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import E, K
from tests.zoo.gate_columns import GateColumns


class Soft(GateColumns):
    """Every gate is open."""

    def gates(self, logits):
        return F.softmax(logits, dim=-1)

    def moe(self, x, gates):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens = self.open(gates, e).nonzero().squeeze(-1)
            out[tokens] += gates[tokens, self.column(e), None] * expert(x[tokens])
            self.after(gates, e)
        return out

    def open(self, gates, e):
        return gates[:, e] > 0

    def column(self, e):
        return e

    def after(self, gates, e):
        pass


class Sparse(Soft):
    gates = GateColumns.gates


class AtLeastZero(Sparse):
    """Gates that are zero count as open: rows of all tokens, although they add nothing."""

    def open(self, gates, e):
        return gates[:, e] >= 0


class AboveNegative(Sparse):
    def open(self, gates, e):
        return gates[:, e] > -0.5


class NextColumn(Sparse):
    """Weighted by the gate of the next expert."""

    def column(self, e):
        return (e + 1) % E


class RepeatedIds(Sparse):
    """Two choices may be one expert, which then has one gate."""

    def gates(self, logits):
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(-1, ids // 2, weights)


class GatesWritten(Sparse):
    """The gates are halved between two experts; those of the others stay open."""

    def gates(self, logits):
        return super().gates(logits).detach().clone()

    def after(self, gates, e):
        gates.mul_(0.5)


class GatesShifted(Sparse):
    """Gates are lifted before anyone asks which are open."""

    def gates(self, logits):
        gates = super().gates(logits).detach()
        gates += 0.1
        return gates


class IdsWritten(Sparse):
    """The ids are others once the gates have been filled: they no longer say whose gates are open."""

    def gates(self, logits):
        weights, ids = F.softmax(logits.detach(), dim=-1).topk(K, dim=-1)
        gates = torch.zeros_like(weights.new_empty(logits.shape)).scatter(-1, ids, weights)
        ids.zero_()
        return gates


class MoreTokens(Sparse):
    """Half of the tokens have no ids; the table has rows for all of them."""

    def gates(self, logits):
        weights, ids = F.softmax(logits, dim=-1)[::2].topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(-1, ids, weights)


MISSES = (
    NearMiss("gate_columns_soft", None, Soft),
    NearMiss("gate_columns_at_least_zero", "loop_has_a_known_form", AtLeastZero),
    NearMiss("gate_columns_above_negative", "loop_has_a_known_form", AboveNegative),
    NearMiss("gate_columns_next", "bodies_are_isomorphic", NextColumn),
    NearMiss("gate_columns_repeated_ids", "repeated_ids_are_counted", RepeatedIds),
    NearMiss("gate_columns_written", "rows_belong_to_tokens", GatesWritten),
    NearMiss("gate_columns_shifted", "loop_has_a_known_form", GatesShifted),
    NearMiss("gate_columns_ids_written", "loop_has_a_known_form", IdsWritten),
    NearMiss("gate_columns_more_tokens", "loop_has_a_known_form", MoreTokens),
)
