"""Almost rows in a stack of one matrix: the dim of size one is used for something."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.stacked import StackedBlock, StackOfOne


class MeanOverRows(StackOfOne):
    """Without the dim of size one, dim 0 would be another."""

    def activate(self, h):
        return super().activate(h) - h.mean(dim=1, keepdim=True)[..., :1]


class RowsReversed(StackOfOne):
    """The last row's result is the first one's."""

    def activate(self, h):
        return super().activate(h).flip(1)


class SecondOfTwo(StackOfOne):
    """Two stacks after each other, of which the second is taken."""

    def taken(self, y):
        return torch.cat((y, y.flip(1)))[1]


class LastRow(StackOfOne):
    """The last row for all of them."""

    def taken(self, y):
        return y[0, -1:].expand(y.shape[1], -1)


class BesideOtherRows(StackOfOne):
    """Rows beside a tensor with as many dims."""

    def activate(self, h):
        scale = torch.linspace(0.5, 1.5, 3, device=h.device).view(3, 1, 1)
        return (super().activate(h) * scale).sum(dim=0, keepdim=True)


def block(experts):
    return lambda: StackedBlock(experts)


MISSES = (
    NearMiss("hit_stack_mean_over_rows", "body_is_row_wise", block(MeanOverRows)),
    NearMiss("hit_stack_rows_reversed", "body_is_row_wise", block(RowsReversed)),
    NearMiss("hit_stack_second_of_two", "body_is_row_wise", block(SecondOfTwo)),
    NearMiss("hit_stack_last_row", "operations_are_known", block(LastRow)),
    NearMiss("hit_stack_beside_other_rows", "body_is_row_wise", block(BesideOtherRows)),
)
