"""Loops that add to more than zeros: a shared expert's output, the input, what is read again later."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import Block, D, SwiGLU


class SharedFirst(Block):
    """A shared expert's output, to which the routed experts are added in place."""

    def __init__(self):
        super().__init__()
        self.shared = SwiGLU()

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = self.shared(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class CopyFirst(Block):
    """`out = x.clone()` and a loop over the experts that were hit."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = x.clone()
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class InputFirst(Block):
    """Additions that aren't in place go on from the input, which is read after them as it was."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = x
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out = out.index_add(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return (out + x.sin()).view_as(hidden_states)


class ZerosReadLater(Block):
    """Additions that aren't in place leave the zeros that they start from as they were."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        zeros = torch.zeros_like(x)
        out = zeros
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out = out.index_add(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return (out + zeros.cos()).view_as(hidden_states)


class StartReadLater(Block):
    """Additions in place, to a tensor that is read by its first name after them."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        start = x * 2
        out = start
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += expert(x[tokens]) * weights[tokens, slots, None]
        return (out + start.cos()).view_as(hidden_states)


class CastEachTime(Block):
    """The output is cast to the dtype of the experts' rows, which it has."""

    def numbers(self, ids):
        return range(self.num_experts)

    def cast(self, out, y):
        return out.to(y.dtype)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in self.numbers(ids):
            tokens, slots = torch.where(ids == e)
            y = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out = self.cast(out, y)
            out.index_add_(0, tokens, y)
        return out.view_as(hidden_states)


class CastEachTimeOfHit(CastEachTime):
    """The same for the experts that were hit."""

    def numbers(self, ids):
        return ids.unique().tolist()


class ReluFirst(Block):
    """Not a program that trains: relu's derivative reads what the loop writes to, and PyTorch says so."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.relu(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


CASES = (
    Case("starts_as_shared", SharedFirst),
    Case("starts_as_copy", CopyFirst),
    Case("starts_as_input", InputFirst),
    Case("starts_as_zeros_read_later", ZerosReadLater),
    Case("starts_as_product_read_later", StartReadLater),
    Case("starts_cast_each_time", CastEachTime),
    Case("starts_cast_each_time_of_hit", CastEachTimeOfHit),
)
