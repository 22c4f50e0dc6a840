"""Sorted slots cut into segments: each expert takes its rows by their numbers and adds its results to their tokens."""

import torch

from tests.zoo.case import Case
from tests.zoo.common import Block, D


class IndexBlock(Block):
    """The sorted slots are cut, not the rows; rows are weighted in place, and added."""

    def ends(self, ids):
        return ids.bincount().cpu().numpy().cumsum(0)

    def add(self, out, tokens, y):
        out.scatter_add_(0, tokens.view(-1, 1).expand(-1, D), y)

    def weighted(self, y, weights):
        y.mul_(weights)
        return y

    def sort(self, ids):
        return ids.argsort()

    def cut(self, weights, order, start, end):
        return weights[order[start:end]]

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        ends, order = self.ends(ids), self.sort(ids)
        tokens = order // self.top_k
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            own = tokens[start:end]
            y = self.weighted(self.experts[e](x[own]), self.cut(weights, order, start, end))
            self.add(out, own, y)
        return out

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        return self.moe(x, ids.view(-1), weights.view(-1, 1)).view(hidden_states.shape)


class InferenceBlock(IndexBlock):
    """Inference of DeepSeek's first MoE as published."""

    @torch.no_grad()
    def moe(self, x, ids, weights):
        return super().moe(x, ids, weights)

    def add(self, out, tokens, y):
        out.scatter_reduce_(0, tokens.view(-1, 1).repeat(1, D), y, reduce="sum")


class IndexAddBlock(IndexBlock):
    """Counts of as many classes as there are experts, rows sorted at once, index_add_."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        order = ids.argsort(stable=True)
        tokens, start = order // self.top_k, 0
        rows, weights = x[tokens], weights[order]
        for e, count in enumerate(ids.bincount(minlength=self.num_experts).tolist()):
            end = start + count
            y = self.experts[e](rows[start:end]).mul_(weights[start:end])
            out.index_add_(0, tokens[start:end], y)
            start = end
        return out


class SearchedBlock(IndexBlock):
    """Where an expert's slots end is searched for among the sorted ids."""

    def search(self, sorted_ids):
        return torch.searchsorted(
            sorted_ids, torch.arange(self.num_experts, device=sorted_ids.device), right=True
        ).tolist()

    def moe(self, x, ids, weights):
        out, start = torch.zeros_like(x), 0
        sorted_ids, order = ids.sort()
        for e, end in enumerate(self.search(sorted_ids)):
            own = order[start:end]
            tokens = own // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[own])
            start = end
        return out


class StartsBlock(IndexBlock):
    """Where an expert's slots begin and end, as tensors: the counts added up, and that without their own."""

    def bounds(self, counts):
        ends = counts.cumsum(0)
        return ends - counts, ends

    def moe(self, x, ids, weights):
        out, order = torch.zeros_like(x), ids.argsort()
        starts, ends = self.bounds(ids.bincount(minlength=self.num_experts))
        for e in range(self.num_experts):
            own = order[starts[e] : ends[e]]
            tokens = own // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[own])
        return out


CASES = (
    Case("segments_of_slots", IndexBlock),
    Case("segments_of_slots_inference", InferenceBlock, differentiable=False),
    Case("segments_of_slots_index_add", IndexAddBlock),
    Case("segments_of_slots_searched", SearchedBlock),
    Case("segments_of_slots_starts", StartsBlock),
)
