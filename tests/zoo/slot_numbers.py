"""All slots flat, their tokens from a list of numbers or their rows from a copy, each K times."""

import torch

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class NumbersByMask(MaskLoop):
    """`arange(T).repeat_interleave(K)`, of which masks pick."""

    def moe(self, x, ids, weights):
        flat, flat_weights, out = ids.reshape(-1), weights.reshape(-1), torch.zeros_like(x)
        numbers = torch.arange(x.shape[0], device=x.device).repeat_interleave(self.top_k)
        for e, expert in enumerate(self.experts):
            mask = flat == e
            if not mask.any():
                continue
            tokens = numbers[mask]
            out.index_add_(0, tokens, expert(x[tokens]) * flat_weights[mask, None])
        return out


class NumbersByPosition(MaskLoop):
    """A column of numbers that was expanded; positions pick."""

    def moe(self, x, ids, weights):
        flat, flat_weights, out = ids.view(-1), weights.view(-1, 1), torch.zeros_like(x)
        numbers = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(-1, self.top_k).reshape(-1)
        for e, expert in enumerate(self.experts):
            slots = (flat == e).nonzero(as_tuple=True)[0]
            tokens = numbers[slots]
            out.index_add_(0, tokens, expert(x[tokens]) * flat_weights[slots])
        return out


class NumbersInOrder(MaskLoop):
    """Numbers in the order of the sorted slots, of which segments are cut; what is counted are the sorted experts."""

    def moe(self, x, ids, weights):
        experts, order = torch.sort(ids.reshape(-1))
        numbers = torch.arange(x.shape[0], device=x.device).unsqueeze(-1).repeat(1, self.top_k).view(-1)
        numbers, weights = numbers.index_select(0, order), weights.reshape(-1, 1).index_select(0, order)
        counts, out, start = torch.bincount(experts, minlength=self.num_experts), torch.zeros_like(x), 0
        for e, expert in enumerate(self.experts):
            count = int(counts[e].item())
            if count == 0:
                continue
            tokens = numbers[start : start + count]
            out.index_add_(0, tokens, expert(x.index_select(0, tokens)) * weights[start : start + count])
            start += count
        return out


class CopiesExpanded(MaskLoop):
    """Rows that are expanded and flattened; the slots' sum after the loop."""

    def moe(self, x, ids, weights):
        rows = x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, D)
        flat, y = ids.view(-1), torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = flat == e
            if mask.any():
                y[mask] = expert(rows[mask])
        return (y.view(-1, self.top_k, D) * weights.unsqueeze(-1)).sum(dim=1)


class CopiesRepeated(MaskLoop):
    """Rows that are repeated along a new dim; positions."""

    def moe(self, x, ids, weights):
        rows = x[:, None, :].repeat(1, self.top_k, 1).view(-1, D)
        flat, y = ids.flatten(), torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            slots = torch.nonzero(flat == e).squeeze(-1)
            y[slots] = expert(rows[slots]) * weights.reshape(-1)[slots].unsqueeze(-1)
        return y.view(-1, self.top_k, D).sum(dim=1)


CASES = (
    Case("slot_numbers_by_mask", NumbersByMask),
    Case("slot_numbers_by_position", NumbersByPosition),
    Case("slot_numbers_in_order", NumbersInOrder),
    Case("flat_copies_expanded", CopiesExpanded),
    Case("flat_copies_repeated", CopiesRepeated),
)
