"""Other words for the same rows: index_select, gather, index_put, transposed positions, casts like another tensor."""

import torch

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class IndexSelected(MaskLoop):
    """`index_select` takes the rows; the cast follows the output's dtype."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y = expert(x.index_select(0, tokens)) * weights[tokens, slots].unsqueeze(1)
            out.index_add_(0, tokens, y.type_as(out))
        return out


class IndexSelectedWide(MaskLoop):
    """The same with a sum in fp32: the cast widens half precision."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y = expert(torch.index_select(x, 0, tokens)) * weights[tokens, slots, None]
            out.index_add_(0, tokens, y.type_as(out))
        return out.type_as(x)


class GatheredRows(MaskLoop):
    """`gather` and `scatter_add` with positions that are repeated along the features."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if tokens.nelement() == 0:
                continue
            rows = tokens[:, None].repeat(1, D)
            y = weights[tokens, slots, None] * expert(torch.gather(x, 0, rows))
            out = torch.scatter_add(out, 0, rows, y)
        return out


class PutRows(MaskLoop):
    """`index_put_` that accumulates."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_put_((tokens,), expert(x[tokens]) * weights[tokens, slots, None], accumulate=True)
        return out


class TransposedPositions(MaskLoop):
    """Positions by `nonzero`, transposed to be unpacked."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.nonzero(ids == e).T
            out[tokens] = out[tokens] + weights[tokens, slots][:, None] * expert(x[tokens])
        return out


class ClippedRows(MaskLoop):
    """Rows are made finite, and compared with a number and with their own mean."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y = torch.nan_to_num(expert(x[tokens]))
            y = torch.where(y > 1, 1 + 0.1 * y, y).masked_fill(y < y.mean(-1, keepdim=True) - 1, 0.0)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class CountedInBins(MaskLoop):
    """torchtitan's experts as a loop: slots are counted by E bins from 0 to E, and weighted before the experts."""

    def moe(self, x, ids, weights):
        counts = torch.histc(ids.view(-1).float(), bins=self.num_experts, min=0, max=self.num_experts)
        order = torch.argsort(ids.view(-1), stable=True)
        tokens = (order // self.top_k).reshape(-1, 1).expand(-1, D)
        rows = torch.gather(x, 0, tokens)
        rows = (rows.float() * weights.view(-1)[order].reshape(-1, 1)).to(x.dtype)
        counts = counts.int().tolist()
        parts = torch.split(rows[: sum(counts)], counts, dim=0)
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.zeros_like(x).scatter_add(0, tokens, torch.cat(outputs))


CASES = (
    Case("picked_index_select", IndexSelected),
    Case("picked_index_select_wide", IndexSelectedWide, op=None),
    Case("picked_gather", GatheredRows),
    Case("picked_index_put", PutRows),
    Case("picked_transposed", TransposedPositions),
    Case("picked_clipped", ClippedRows, op=None),
    Case("picked_in_bins", CountedInBins, op=None),
)
