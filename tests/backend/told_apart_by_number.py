"""Loops over all experts that ask for an expert's number, or which of all it is: one does not stand for all."""

import torch

from tests.near_misses.common import Loop


class Plain(Loop):
    """A range loop whose iteration a subclass writes, as (tokens, value)."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.run(e, x[tokens]) * weights[tokens, slots, None])
        return out

    def run(self, e, rows):
        return self.experts[e](rows)


class Iterated(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        e = 0
        for _, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
            e += 1  # noqa: SIM113  a number counted by hand is what this program is about
        return out


class BranchesOnNumber(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) if e != 3 else rows


class LooksNumberUp(Plain):
    def run(self, e, rows):
        return rows if e in {1, 3} else self.experts[e](rows)


class ScalesByNumber(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * (e + 1)


class NamesAttribute(Plain):
    """An attribute that only one expert has a name for."""

    def __init__(self):
        super().__init__()
        self.scale_2 = 3.0

    def run(self, e, rows):
        return self.experts[e](rows) * getattr(self, f"scale_{e}", 1.0)


class LooksInDict(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * {2: 3.0}.get(e, 1.0)


class FormatsNumber(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * (2.0 if str(e) == "2" else 1.0)


class ComparesIdentity(Plain):
    def run(self, e, rows):
        expert = self.experts[e]
        return expert(rows) * (2.0 if expert is self.experts[1] else 1.0)


class SearchesModule(Plain):
    def run(self, e, rows):
        expert = self.experts[e]
        return expert(rows) * (2.0 if expert in [self.experts[1]] else 1.0)


class ComparesParameter(Plain):
    def run(self, e, rows):
        expert = self.experts[e]
        return expert(rows) * (2.0 if expert.w1.weight is self.experts[1].w1.weight else 1.0)


class AsksForId(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * (2.0 if id(self.experts[e]) == id(self.experts[1]) else 1.0)


class AppendsNumber(Plain):
    def __init__(self):
        super().__init__()
        self.seen = []

    def run(self, e, rows):
        self.seen.append(e)
        return self.experts[e](rows)


CASES = {
    block.__name__: block
    for block in (
        *(BranchesOnNumber, LooksNumberUp, ScalesByNumber, NamesAttribute, LooksInDict, FormatsNumber, Iterated),
        *(ComparesIdentity, SearchesModule, ComparesParameter, AsksForId, AppendsNumber),
    )
}
