"""Rows sorted by expert and cut into segments: numbers of tokens in Python, slices or split, cat, rows put back."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, E, K


class SegmentBlock(Block):
    """A ModuleList of experts on segments; subclasses replace a step."""

    def counts(self, ids):
        return torch.bincount(ids.view(-1), minlength=self.num_experts)

    def parts(self, rows, counts):
        """What each expert makes of its rows."""
        segments = torch.split(rows, counts.tolist(), dim=0)
        return [expert(segment) for expert, segment in zip(self.experts, segments, strict=True)]

    def combine(self, grouped, x, order, weights):
        y = grouped * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // self.top_k, y)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        order = ids.view(-1).argsort()
        rows = x[order // self.top_k]
        grouped = torch.cat(self.parts(rows, self.counts(ids)), dim=0)
        return self.combine(grouped, x, order, weights).view(hidden_states.shape)


class ComparedBlock(SegmentBlock):
    """Counts are sums of one comparison with the numbers of all experts."""

    def counts(self, ids):
        return (ids.view(-1, 1) == torch.arange(self.num_experts, device=ids.device)[None]).sum(dim=0).cpu()


class SlicedBlock(SegmentBlock):
    """Starts and ends kept in Python; segments of experts without tokens are computed as well."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts.tolist()):
            outputs.append(self.experts[e](rows[start : start + count]))
            start += count
        return outputs


class SkippingBlock(SegmentBlock):
    """Experts without tokens are skipped: their parts are missing."""

    def skips(self, count):
        return count == 0

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            if self.skips(count):
                continue
            outputs.append(self.experts[e](rows[start:end]))
            start = end
        return outputs


class ArrayBlock(SegmentBlock):
    """Inference of DeepSeek-V2 as published: numbers from numpy, experts without tokens skipped, rows put back."""

    def counts(self, ids):
        table = ids.new_zeros((ids.shape[0], len(self.experts)))
        table.scatter_(1, ids, 1)
        return table.sum(dim=0)

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts.cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start:end]))
            start = end
        return outputs

    def combine(self, grouped, x, order, weights):
        slots = torch.empty_like(grouped)
        slots[order] = grouped
        slots = slots.view(*weights.shape, -1).type(weights.dtype)
        return slots.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(grouped.dtype)


class TensorBlock(ArrayBlock):
    """DeepSeek-V2 of transformers 4: counts stay tensors, and so do the places where segments begin and end."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            end = start + count
            outputs.append(self.experts[e](rows[start:end]))
            start = end
        return outputs


class WrittenBlock(nn.Module):
    """Aria of transformers 4: each product is a loop of its own, which writes every expert's rows to zeros."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.up, self.down = (nn.Parameter(torch.empty(E, *sizes)) for sizes in ((D, 2 * FF), (FF, D)))

    def bounds(self, counts):
        ends = torch.cumsum(counts, dim=0)
        return torch.cat((torch.zeros(1, dtype=torch.long, device=ends.device), ends))

    def product(self, rows, weight, counts):
        out = torch.zeros(rows.shape[0], weight.shape[-1], dtype=rows.dtype, device=rows.device)
        bounds = self.bounds(counts)
        for e in range(weight.shape[0]):
            start, end = bounds[e], bounds[e + 1]
            self.write(out, start, end, torch.matmul(rows[start:end], weight[e]))
        return out

    def write(self, out, start, end, y):
        out[start:end] = y

    def put_back(self, order, y):
        slots = torch.zeros((order.shape[0], D), dtype=y.dtype, device=y.device)
        slots.index_copy_(0, order, y)
        return slots.view(-1, K, D)

    def forward(self, hidden_states):
        x = hidden_states.view(-1, D)
        top, ids = torch.topk(self.router(x), k=K, dim=1)
        counts = torch.histc(ids.flatten().to(torch.float32), bins=E, min=0, max=E - 1).to(ids.dtype)
        order = torch.argsort(ids.view(-1))
        gate, up = self.product(x.index_select(0, order // K), self.up, counts.cpu()).chunk(2, dim=-1)
        y = self.product(F.silu(gate) * up, self.down, counts.cpu())
        out = self.put_back(order, y) * F.softmax(top, dim=-1).unsqueeze(-1)
        return out.sum(dim=1).view(hidden_states.shape)


class ResidualBlock(SkippingBlock):
    """The experts' rows are added to their tokens themselves: the segments alone are rewritten."""

    def combine(self, grouped, x, order, weights):
        y = grouped * weights.view(-1)[order].unsqueeze(-1)
        return x.index_add(0, order // self.top_k, y)


class ForLoopExperts(nn.Module):
    """Stacked weights [E, in, out], rows weighted before the experts, as in torchtune."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.w1, self.w3 = nn.Parameter(torch.empty(E, D, FF)), nn.Parameter(torch.empty(E, D, FF))
        self.w2 = nn.Parameter(torch.empty(E, FF, D))

    def route(self, x):
        scores, ids = torch.topk(torch.sigmoid(self.gate(x).float()).to(x.dtype), k=K, dim=1)
        counts = torch.histc(ids.view(-1).float(), bins=E, min=0, max=E - 1).int()
        order = torch.argsort(ids.view(-1), stable=True)
        return scores.view(-1)[order], order // K, counts

    def experts(self, rows, counts):
        sizes = counts.tolist()
        padding = rows.shape[0] - sum(sizes)
        outputs = []
        for e, segment in enumerate(torch.split(rows[: sum(sizes)], split_size_or_sections=sizes, dim=0)):
            h = F.silu(torch.matmul(segment, self.w1[e])) * torch.matmul(segment, self.w3[e])
            outputs.append(torch.matmul(h, self.w2[e]))
        out = torch.cat(outputs, dim=0)
        return torch.vstack((out, out.new_zeros((padding, out.shape[-1])))) if padding else out

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        scores, tokens, counts = self.route(x)
        index = tokens.reshape(-1, 1).expand(-1, D)
        rows = torch.gather(x, dim=0, index=index) * scores.reshape(-1, 1)
        out = torch.zeros_like(x)
        out.scatter_add_(dim=0, index=index, src=self.experts(rows, counts))
        return out.reshape(hidden_states.shape)


CASES = (
    Case("segments_split", SegmentBlock),
    Case("segments_compared", ComparedBlock),
    Case("segments_sliced", SlicedBlock),
    Case("segments_skipped", SkippingBlock),
    Case("segments_array", ArrayBlock),
    Case("segments_tensors", TensorBlock),
    Case("segments_written", WrittenBlock),
    Case("segments_for_loop", ForLoopExperts),
    Case("segments_residual", ResidualBlock),
)
