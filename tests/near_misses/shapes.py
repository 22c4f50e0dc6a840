"""Dims that are not what they seem: rows elsewhere than in dim 0, ranks that broadcast otherwise once repeated."""

import torch
from torch import nn

from tests.near_misses.common import NearMiss, RangeLoop
from tests.zoo.common import D, E


class Body(RangeLoop):
    """The expert's result goes through `change`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def value(self, x, weights, tokens, slots, e):
        return self.change(self.expert(x[tokens], e)) * weights[tokens, slots, None]


class Parameter(RangeLoop):
    """One more parameter of `shape`, used by `use(y, parameter, e)`."""

    def __init__(self, shape, use):
        super().__init__()
        self.more = nn.Parameter(torch.empty(shape))
        self.use = use

    def value(self, x, weights, tokens, slots, e):
        return self.use(self.expert(x[tokens], e), self.more, e) * weights[tokens, slots, None]


class Added(RangeLoop):
    """What is added is a parameter, by `choose(parameter, e)`, whatever the tokens hold."""

    def __init__(self, shape, choose):
        super().__init__()
        self.more = nn.Parameter(torch.empty(shape))
        self.choose = choose

    def value(self, x, weights, tokens, slots, e):
        return self.choose(self.more, e)

    def add(self, out, tokens, y):
        out[tokens] += y


class MeanOfLeadingDim(RangeLoop):
    """`x[None, tokens]` has its rows in dim 1."""

    def value(self, x, weights, tokens, slots, e):
        return x[None, tokens].mean(1)

    def add(self, out, tokens, y):
        out[tokens] += y


class TableOfAllExperts(RangeLoop):
    """Every expert's result for every token, computed before: a [T, E, D] table is no table of router weights."""

    def prepare(self, x, ids, weights):
        return torch.stack([self.expert(x, e) for e in range(E)], dim=1), ids, weights

    def zeros(self, x):
        return torch.zeros_like(x[:, 0])

    def value(self, x, weights, tokens, slots, e):
        return x[tokens, e] * weights[tokens, slots, None]


class WeightsOfRankThree(RangeLoop):
    """`weights[tokens, :, slots]` of a [T, 2, K] tensor."""

    def prepare(self, x, ids, weights):
        return x, ids, torch.stack([weights, 2 * weights], 1)

    def value(self, x, weights, tokens, slots, e):
        y = self.expert(x[tokens], e)
        return y * weights[tokens, :, slots].sum(-1, keepdim=True)


class TokensAsParameters(RangeLoop):
    """`x[e]`: row e of the input, as if it were expert e's parameter. The number of rows may change."""

    def value(self, x, weights, tokens, slots, e):
        return super().value(x, weights, tokens, slots, e) * x[e]


class TransposedZeros(RangeLoop):
    """zeros_like of a transposed matrix keeps its strides."""

    def zeros(self, x):
        return torch.zeros_like(x.t().contiguous().t())

    def forward(self, hidden_states):
        out = super().forward(hidden_states)
        return out * out.stride(0)


ROWS, LAYER, TOKENS = "body_is_row_wise", "dtypes_are_those_of_a_layer", "rows_belong_to_tokens"

MISSES = (
    NearMiss("range_sum_of_no_dims", ROWS, lambda: Body(lambda y: y - y.sum(dim=(), keepdim=True))),
    NearMiss(
        "range_transposed_by_keyword",
        ROWS,
        lambda: Body(lambda y: y.transpose(dim0=0, dim1=1).softmax(-1).transpose(dim0=0, dim1=1)),
    ),
    NearMiss(
        "range_axes_swapped_by_keyword",
        ROWS,
        lambda: Body(lambda y: y.swapaxes(axis0=0, axis1=1).softmax(-1).swapaxes(axis0=0, axis1=1)),
    ),
    NearMiss("range_row_of_rank_two", ROWS, lambda: Parameter((E, 1, D), lambda y, p, e: y + p[e]), may_rewrite=True),
    NearMiss(
        "range_column_transposed", ROWS, lambda: Parameter((E, D, 1), lambda y, p, e: y + p[e].t()), may_rewrite=True
    ),
    NearMiss(
        "range_permuted_by_identity",
        None,
        lambda: Parameter((E, D, D), lambda y, p, e: y @ p[e].permute(-2, -1)),
        may_rewrite=True,
    ),
    NearMiss("range_adds_a_parameter", LAYER, lambda: Added((E, 1, D), lambda p, e: p[e])),
    NearMiss("range_adds_one_parameter", LAYER, lambda: Added((1, D), lambda p, e: p)),
    NearMiss("range_mean_of_leading_dim", ROWS, MeanOfLeadingDim),
    NearMiss("range_table_of_all_experts", "bodies_are_isomorphic", TableOfAllExperts),
    NearMiss("range_weights_of_rank_three", "bodies_are_isomorphic", WeightsOfRankThree),
    NearMiss("range_tokens_as_parameters", None, TokensAsParameters, may_rewrite=True),
    NearMiss("range_transposed_zeros", "accumulator_may_be_added_to", TransposedZeros),
)
