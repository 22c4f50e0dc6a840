"""Effects that are easily overlooked: writes under an alias or by innocent functions, random draws, assertions."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss, RangeLoop
from tests.zoo.common import FF, D, E


@torch.library.custom_op("near_miss::double_", mutates_args={"x"})
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


@double_.register_fake
def _(x):
    return None


class WritesInput(RangeLoop):
    """Half way the rows change that the later experts read: `write` writes what `view` shows."""

    def __init__(self, view, write):
        super().__init__()
        self.view, self.write = view, write

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        base = x.detach() * 1
        x = self.view(base)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
            if e == 1:
                self.write(base)
        return out


class WritesRows(RangeLoop):
    """`write` changes an expert's own result."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def value(self, x, weights, tokens, slots, e):
        y = self.expert(x[tokens], e).detach()
        self.write(y)
        return y * weights[tokens, slots, None]


class WritesBuffer(RangeLoop):
    """`write` changes a buffer of the module in each iteration."""

    def __init__(self, write):
        super().__init__()
        self.register_buffer("seen", torch.ones(64, D))
        self.write = write

    def aside(self, x, ids, tokens, e):
        self.write(self.seen, x.detach()[tokens], tokens)


class Statistics(RangeLoop):
    """Running statistics that the later experts read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(D))
        self.register_buffer("var", torch.ones(D))

    def value(self, x, weights, tokens, slots, e):
        return super().value(x, weights, tokens, slots, e) * self.mean

    def aside(self, x, ids, tokens, e):
        F.batch_norm(x.detach(), self.mean, self.var, training=True)


class IdsMadeEqual(RangeLoop):
    """The ids of a token are made equal in place; `+=` then loses one."""

    def prepare(self, x, ids, weights):
        ids = ids.clone()
        ids[:, 1] = ids[:, 0]
        return x, ids, weights

    def add(self, out, tokens, y):
        out[tokens] += y


class IdsChangeUnderAlias(RangeLoop):
    """`long()` of int64 ids is the ids: the later experts select by others."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        ids = ids.clone()
        same = ids.long()
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(same == e)
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
            if e == 1:
                ids.fill_(0)
        return out


class InputWrittenAfter(RangeLoop):
    """Eager keeps copies of rows for backward, so the program may overwrite what they were copied from."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        x = x * 1
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        x.add_(1)
        return out + x


class BiasWrittenAfter(RangeLoop):
    """The gradient of a bias is made without it, so eager doesn't mind that it is written."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(E, 2 * FF))

    def expert(self, x, e):
        gate, up = F.linear(x, self.experts.gate_up_proj[e], self.bias[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.experts.down_proj[e])

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        with torch.no_grad():
            self.bias.mul_(0.9)
        return out


class CustomWriteBefore(RangeLoop):
    """The zeros are no zeros any more when the loop begins."""

    def zeros(self, x):
        out = torch.zeros_like(x)
        torch.ops.near_miss.double_(out.add_(1))
        return out


class ZerosInBuffer(RangeLoop):
    """`zeros(..., out=...)` writes a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("big", torch.ones(64, D))

    def zeros(self, x):
        return torch.zeros(x.shape[0], D, out=self.big[: x.shape[0]])

    def add(self, out, tokens, y):
        super().add(out, tokens, y.detach())

    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states.reshape(-1, D)


class HalvesOfOutput(RangeLoop):
    """Views of the output are taken before the loop and returned."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        halves = out[:, : D // 2], out[:, D // 2 :]
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return halves


class DeadDropout(RangeLoop):
    """Nobody reads what is dropped, but the random numbers are drawn."""

    def value(self, x, weights, tokens, slots, e):
        y = super().value(x, weights, tokens, slots, e)
        F.dropout(y, 0.5)
        return y


class ChecksCount(RangeLoop):
    """The program's own assertion on an expert's number of rows."""

    def value(self, x, weights, tokens, slots, e):
        torch._check(tokens.shape[0] < 24)
        return super().value(x, weights, tokens, slots, e)


WRITTEN, ESCAPES, ZEROS = "nothing_is_written_inside", "no_intermediate_escapes", "accumulator_may_be_added_to"

INPUTS = (
    ("under_ravel", lambda x: x.ravel().view(-1, D), lambda x: x.mul_(2)),
    ("under_type_as", lambda x: x.type_as(x), lambda x: x.mul_(2)),
    ("under_double_transpose", lambda x: x.mT.mT, lambda x: x.mul_(2)),
    ("under_second_of_two", lambda x: torch.broadcast_tensors(x[:1] + 1, x)[1], lambda x: x.mul_(2)),
    ("by_second_of_two", lambda x: x, lambda x: torch.atleast_2d(x[:1] + 1, x)[1].mul_(2)),
    ("by_custom_op", lambda x: x, torch.ops.near_miss.double_),
    ("by_positional_inplace", lambda x: x, lambda x: F.elu(x, 1.0, True)),
    ("by_out", lambda x: x, lambda x: torch.mul(x, 2, out=x)),
)
ROWS = (
    ("by_custom_op", torch.ops.near_miss.double_),
    ("by_foreach", lambda y: torch._foreach_mul_([y], 2.0)),
    ("by_positional_inplace", lambda y: F.relu(y, True)),
)
BUFFERS = (
    ("by_max_norm", lambda seen, rows, tokens: F.embedding(tokens, seen, max_norm=0.1)),
    ("by_out", lambda seen, rows, tokens: torch.sum(rows, 0, out=seen[0])),
)

MISSES = (
    *(NearMiss(f"range_input_{name}", WRITTEN, partial(WritesInput, view, write)) for name, view, write in INPUTS),
    *(NearMiss(f"range_rows_{name}", WRITTEN, partial(WritesRows, write), may_rewrite=True) for name, write in ROWS),
    *(NearMiss(f"range_buffer_{name}", ESCAPES, partial(WritesBuffer, write)) for name, write in BUFFERS),
    NearMiss("range_statistics", WRITTEN, Statistics),
    NearMiss("range_ids_made_equal", "repeated_ids_are_counted", IdsMadeEqual),
    NearMiss("range_ids_under_long", WRITTEN, IdsChangeUnderAlias),
    NearMiss("range_input_written_after", "tensors_for_backward_stay_as_they_are", InputWrittenAfter),
    NearMiss("range_bias_written_after", "tensors_for_backward_stay_as_they_are", BiasWrittenAfter),
    NearMiss("range_custom_write_before", "accumulator_may_be_added_to", CustomWriteBefore),
    NearMiss("range_zeros_in_buffer", ZEROS, ZerosInBuffer),
    NearMiss("range_halves_of_output", "accumulator_is_not_read_inside", HalvesOfOutput),
    NearMiss("range_dead_dropout", ESCAPES, DeadDropout),
    NearMiss("range_checks_count", ESCAPES, ChecksCount),
)
