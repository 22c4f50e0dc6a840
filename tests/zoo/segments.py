"""Rows sorted by expert and cut into segments: numbers of tokens in Python, slices or split, cat, rows put back."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, E, K
from tests.zoo.others import ParallelExperts


class GroupingRouter(nn.Module):
    """Routes, sorts and counts, as JetMoE and the first Granite MoE do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, E, bias=False)

    def forward(self, x):
        """Return order_N, tokens_N, weights_N and the number of rows of each expert."""
        logits, ids = self.layer(x).float().topk(K, dim=1)
        weights = torch.softmax(logits, dim=1).type_as(x)
        chosen = torch.zeros([weights.size(0), E], dtype=weights.dtype, device=weights.device).scatter(1, ids, 1)
        sizes = chosen.long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        tokens = order.div(K, rounding_mode="trunc")
        return order, tokens, weights.flatten()[order], sizes


class MixtureOfProjections(nn.Module):
    """As a mixture of attention heads: each slot is projected, then something happens to it, then all come together."""

    def __init__(self):
        super().__init__()
        self.router = GroupingRouter()
        self.input_linear, self.output_linear = ParallelExperts(E, D, FF), ParallelExperts(E, FF, D)

    def source(self, x):
        return x

    def sorted_rows(self, source, tokens):
        return source[tokens]

    def by_slot(self, order, rows, inputs):
        zeros = torch.zeros((rows.shape[0], FF), dtype=rows.dtype, device=rows.device)
        return zeros.index_add(0, order, rows)

    def finish(self, source):
        pass

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        order, tokens, weights, sizes = self.router(x)
        source = self.source(x)
        rows = self.sorted_rows(source, tokens)
        slots = self.by_slot(order, self.input_linear(rows, sizes), rows).view(-1, K, FF)
        slots = F.normalize(slots, dim=-1) + slots.mean(1, keepdim=True)
        y = self.output_linear(slots.reshape(-1, FF)[order], sizes) * weights[:, None]
        zeros = torch.zeros((x.shape[0], D), dtype=y.dtype, device=y.device)
        self.finish(source)
        return zeros.index_add(0, tokens, y).view(hidden_states.shape)


class WrittenRows(MixtureOfProjections):
    """What the rows were taken from is written to after the product, before the backward pass."""

    def source(self, x):
        return x * 2

    def sorted_rows(self, source, tokens):
        return source.index_select(0, tokens)

    def finish(self, source):
        source.mul_(3)


class DetachedRows(MixtureOfProjections):
    """The rows were taken, and their products put back, where nothing is recorded."""

    def sorted_rows(self, source, tokens):
        with torch.no_grad():
            return source[tokens]

    def by_slot(self, order, rows, inputs):
        with torch.no_grad():
            slots = super().by_slot(order, rows, inputs)
        return slots + rows.mean()


class OtherPlaces(MixtureOfProjections):
    """Rows are taken in another order than that of the segments, and added to what isn't zero."""

    def sorted_rows(self, source, tokens):
        return source[tokens.flip(0)]

    def by_slot(self, order, rows, inputs):
        return torch.ones_like(rows).index_add(0, order, rows)


class TwoReaders(MixtureOfProjections):
    """Sorted rows, and products in their order, are read twice."""

    def by_slot(self, order, rows, inputs):
        return super().by_slot(order, rows, inputs) + rows.mean() + inputs.mean()


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
    Case("segments_sliced", SlicedBlock),
    Case("segments_skipped", SkippingBlock),
    Case("segments_array", ArrayBlock),
    Case("segments_tensors", TensorBlock),
    Case("segments_written", WrittenBlock),
    Case("segments_of_slots", IndexBlock),
    Case("segments_of_slots_inference", InferenceBlock, differentiable=False),
    Case("segments_of_slots_index_add", IndexAddBlock),
    Case("segments_for_loop", ForLoopExperts),
    Case("segments_residual", ResidualBlock),
    Case("segments_projections", MixtureOfProjections, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_written", WrittenRows, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_detached", DetachedRows, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_elsewhere", OtherPlaces, regions=2, op="parallel_linear", activation="any"),
    Case("segments_projections_read_twice", TwoReaders, regions=2, op="parallel_linear", activation="any"),
)
