"""Writes to an expert's own tensors that others see, or that are not the same in all experts."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.temporaries import Temporaries


class Written(Temporaries):
    """`write` works on the pre-activation; what it returns comes before the last layer."""

    def expert(self, e, x):
        return self.experts[e].w2(self.write(e, self.experts[e].w1(x), x))


class ViewBefore(Written):
    """A view from before sees what is written later."""

    def write(self, e, h, x):
        half = h[:, :8]
        h.relu_()
        return h + half.repeat(1, 3)


class ReadBefore(Written):
    """What was read before is of older values."""

    def write(self, e, h, x):
        old = h.sigmoid()
        h.mul_(2)
        return h + old


class ReadBetween(Written):
    """Between two writes."""

    def write(self, e, h, x):
        old = h.mul_(2).sigmoid()
        h.add_(1)
        return h + old


class ReadsItself(Written):
    """What is written depends on the rows that are written to, as they were before."""

    def write(self, e, h, x):
        h.add_(1)
        h.add_(h, alpha=0.5)
        return h


class HalfWritten(Written):
    """A view is written: a part of the rows."""

    def write(self, e, h, x):
        h[:, :8].relu_()
        return h


class FirstRowsWritten(Written):
    """The first rows of an expert alone."""

    def write(self, e, h, x):
        h[:2] *= 2
        return h


class CastReadBeside(Temporaries):
    """Rows that are written by the name that a cast gave them are read by their own."""

    def expert(self, e, x):
        y = self.experts[e](x)
        y.to(x.dtype).mul_(2)
        return y


class OneWrites(Written):
    """One expert alone."""

    def write(self, e, h, x):
        return h.relu_() if e == 1 else h.relu()


class OtherOrder(Written):
    """One expert adds and multiplies in another order."""

    def write(self, e, h, x):
        return h.add_(1).mul_(2) if e != 2 else h.mul_(2).add_(1)


class WithoutGrad(Written):
    """Nobody records that it is written."""

    def write(self, e, h, x):
        with torch.no_grad():
            h.mul_(2)
        return h


class MixedRows(Written):
    """A mean over rows is taken off."""

    def write(self, e, h, x):
        return F.relu(h.sub_(x.mean(0, keepdim=True).sum()), inplace=True)


class InputWritten(Written):
    """What is written is no copy: the tokens themselves."""

    def write(self, e, h, x):
        self.tokens.mul_(0.5)
        return h

    def moe(self, x, ids, weights):
        self.tokens = x * 1
        out = super().moe(self.tokens, ids, weights)
        self.tokens = None
        return out


class WeightWritten(Written):
    """A parameter: it keeps what was written."""

    def write(self, e, h, x):
        with torch.no_grad():
            self.experts[e].w2.weight.detach().mul_(0.5)
        return h


WRITTEN, ESCAPES, BODIES = "nothing_is_written_inside", "no_intermediate_escapes", "bodies_are_isomorphic"

MISSES = (
    NearMiss("temporaries_view_before", ESCAPES, ViewBefore),
    NearMiss("temporaries_read_before", ESCAPES, ReadBefore, may_rewrite=True),
    NearMiss("temporaries_read_between", ESCAPES, ReadBetween, may_rewrite=True),
    NearMiss("temporaries_read_themselves", ESCAPES, ReadsItself, may_rewrite=True),
    NearMiss("temporaries_half_written", ESCAPES, HalfWritten),
    NearMiss("temporaries_first_rows_written", ESCAPES, FirstRowsWritten),
    NearMiss("temporaries_cast_read_beside", ESCAPES, CastReadBeside, may_rewrite=True),
    NearMiss("temporaries_one_writes", BODIES, OneWrites),
    NearMiss("temporaries_other_order", BODIES, OtherOrder),
    NearMiss("temporaries_without_grad", "grad_mode_is_constant", WithoutGrad),
    NearMiss("temporaries_mixed_rows", "body_is_row_wise", MixedRows),
    NearMiss("temporaries_input_written", WRITTEN, InputWritten),
    NearMiss("temporaries_weight_written", WRITTEN, WeightWritten),
)
