"""Casts that lose something, rows that are not floating point, promotions that a fused layer would not make."""

import torch
from torch import nn

from tests.near_misses.common import NearMiss, RangeLoop
from tests.near_misses.flat import FlatLoop
from tests.zoo.common import D, E
from tests.zoo.dense_modules import SumOfProducts


class Weighted(RangeLoop):
    """The router's weights, changed by `change`, as factors."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def prepare(self, x, ids, weights):
        return x, ids, self.change(weights)


class Kept(RangeLoop):
    """A factor per token, made by `keep`."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        keep = self.keep(x)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e) * keep[tokens])
        return out


class Cast(RangeLoop):
    """The expert's result goes through `cast`."""

    def __init__(self, cast):
        super().__init__()
        self.cast = cast

    def value(self, x, weights, tokens, slots, e):
        return self.cast(self.expert(x[tokens], e)) * weights[tokens, slots, None]


class WiderBias(RangeLoop):
    """bfloat16 weights and a float32 bias: the sum is float32."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D, D, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.empty(E, D))

    def value(self, x, weights, tokens, slots, e):
        y = x[tokens].bfloat16() @ self.weight[e] + self.bias[e]
        return y * weights[tokens, slots, None]


class RoundedOnTheWay(RangeLoop):
    """What is added went through fp16, in which it is infinite."""

    def value(self, x, weights, tokens, slots, e):
        large = self.expert(x[tokens], e).abs() * 1e30
        return (large * weights[tokens, slots, None]).half().float()

    def forward(self, hidden_states):
        out = super().forward(hidden_states)
        return torch.where(out.isinf(), 0.0, out)


class DoubleSum(RangeLoop):
    """float32 rows are added up in float64, which float32 sums are not as exact as."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        out = out.double()
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out[tokens] += self.value(x, weights, tokens, slots, e)
        return out


class DoubleRows(DoubleSum):
    """They are cast first."""

    def value(self, x, weights, tokens, slots, e):
        return super().value(x, weights, tokens, slots, e).double()


class RoundedWeight(RangeLoop):
    """The router's weight, too, may go through fp16: as a row's own it is rounded, not as the tokens'."""

    def value(self, x, weights, tokens, slots, e):
        return self.expert(x[tokens], e) * weights[tokens, slots, None].half().float()


class DenseRounded(SumOfProducts):
    """A column of the table, or a product with it, goes through fp16."""

    def __init__(self, weight, product):
        super().__init__()
        self.weight, self.product = weight, product

    def add_up(self, x, table):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + self.product(self.weight(table[..., e : e + 1]) * expert(x))
        return out


class FlatRoundedOnTheWay(FlatLoop):
    """The same of weighted rows by slot."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids).view(*ids.shape, D)
        return (y * weights.unsqueeze(-1)).half().float().sum(dim=1)


class ScaleOfExpert(RangeLoop):
    """A float32 scalar an expert: multiplying by it leaves bfloat16 rows bfloat16."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(E))

    def value(self, x, weights, tokens, slots, e):
        y = self.expert(x[tokens], e).bfloat16() * self.scale[e]
        return y.float() * weights[tokens, slots, None]


class Overflowing(RangeLoop):
    """Tokens are counted in int8: 128 of them are negative."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        hit = (mask.sum(dim=(-1, -2), dtype=torch.int8) > 0).nonzero()
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class AskedForItsDtype(FlatLoop):
    """The sum serves another tensor's cast alone, which is no cast of the sum."""

    def moe(self, x, ids, weights):
        return (x * 2).type_as(super().moe(x, ids, weights))


def rounded(value):
    return value.half().float()


def same(value):
    return value


LAYER, ROWS = "dtypes_are_those_of_a_layer", "body_is_row_wise"

MISSES = (
    NearMiss("range_bool_weights", LAYER, lambda: Weighted(lambda weights: weights > 0.5)),
    NearMiss("range_int_weights", LAYER, lambda: Weighted(lambda weights: (weights > 0.5).long())),
    NearMiss("range_bool_rows", LAYER, lambda: Kept(lambda x: x > 0)),
    NearMiss("range_int_rows", LAYER, lambda: Kept(lambda x: (x > 0).long())),
    NearMiss(
        "range_to_float8", ROWS, lambda: Cast(lambda y: y.to(torch.float8_e4m3fn).to(torch.float32)), may_rewrite=True
    ),
    NearMiss("range_to_int", ROWS, lambda: Cast(lambda y: y.to(torch.int32).to(torch.float32)), may_rewrite=True),
    NearMiss("range_seen_as_int", ROWS, lambda: Cast(lambda y: y.view(torch.int32).float() * 1e-9)),
    NearMiss("range_wider_bias", ROWS, WiderBias, may_rewrite=True),
    NearMiss("range_scale_of_expert", ROWS, ScaleOfExpert),
    NearMiss("range_rounded_on_the_way", None, RoundedOnTheWay, may_rewrite=True),
    NearMiss("range_double_sum", LAYER, DoubleSum),
    NearMiss("range_double_rows", LAYER, DoubleRows),
    NearMiss("range_rounded_weight", None, RoundedWeight, may_rewrite=True),
    NearMiss("dense_rounded_weight", None, lambda: DenseRounded(rounded, same)),
    NearMiss("dense_rounded_product", None, lambda: DenseRounded(same, rounded)),
    NearMiss("dense_narrow_product", None, lambda: DenseRounded(same, torch.Tensor.half)),
    NearMiss("flat_rounded_on_the_way", "slots_of_a_token_are_summed", FlatRoundedOnTheWay, may_rewrite=True),
    NearMiss("flat_asked_for_its_dtype", None, AskedForItsDtype, may_rewrite=True),
    NearMiss("hit_overflowing_counts", "loop_is_over_the_hit_experts", Overflowing),
)
