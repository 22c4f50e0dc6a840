"""Bodies that mix rows, draw random numbers, carry hooks or hide from autograd."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.near_misses.common import NearMiss
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.common import D, SwiGLU


class MeanOverTokens(SwiGLU):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class MeanNegativeDim(SwiGLU):
    def forward(self, x):
        return super().forward(x) - x.mean(dim=-2, keepdim=True)


class SoftmaxOverTokens(SwiGLU):
    def forward(self, x):
        return super().forward(x) * F.softmax(x, dim=0)


class CumsumOverTokens(SwiGLU):
    def forward(self, x):
        return super().forward(torch.cumsum(x, dim=0))


class FlipTokens(SwiGLU):
    def forward(self, x):
        return super().forward(x) + x.flip(0)


class SortTokens(SwiGLU):
    def forward(self, x):
        return super().forward(x.sort(dim=0).values)


class RollTokens(SwiGLU):
    def forward(self, x):
        return super().forward(x.roll(1, 0))


class TopTokens(SwiGLU):
    def forward(self, x):
        return super().forward(x) * (x >= x.amax(dim=0))


class AttentionAmongTokens(SwiGLU):
    def forward(self, x):
        return super().forward(F.softmax(x @ x.t(), dim=-1) @ x)


class GlobalMax(SwiGLU):
    def forward(self, x):
        y = super().forward(x)
        return y / (1 + y.pow(2).sum())


class DivideByCount(SwiGLU):
    def forward(self, x):
        return super().forward(x) / (1 + x.shape[0])


class RowNumber(SwiGLU):
    def forward(self, x):
        return super().forward(x) * torch.arange(x.shape[0], device=x.device)[:, None]


class FirstRowZero(SwiGLU):
    def forward(self, x):
        y = super().forward(x)
        return torch.cat((torch.zeros_like(y[:1]), y[1:]))


class Retiled(SwiGLU):
    """A reshape that hands each row parts of other rows."""

    def forward(self, x):
        return super().forward(x.t().reshape(-1, D))


class BatchNormed(SwiGLU):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        return self.norm(super().forward(x))


class InPlaceOnRow(SwiGLU):
    """Writes one row of its own output."""

    def forward(self, x):
        y = super().forward(x) * 1
        y[:1] = 0
        return y


class Dropped(SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.3, self.training)


class Noisy(SwiGLU):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class RandomLeaky(SwiGLU):
    def forward(self, x):
        return super().forward(F.rrelu(x, training=self.training))


class DetachedInput(SwiGLU):
    def forward(self, x):
        return super().forward(x.detach())


class DetachedGate(SwiGLU):
    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)).detach() * self.w3(x))


class NoGradGate(SwiGLU):
    def forward(self, x):
        with torch.no_grad():
            gate = self.act_fn(self.w1(x))
        return self.w2(gate * self.w3(x))


class TensorHook(SwiGLU):
    """The gradient of the hidden layer is doubled on its way back."""

    def forward(self, x):
        hidden = self.act_fn(self.w1(x)) * self.w3(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * 2)
        return self.w2(hidden)


class DoubleGrad(torch.autograd.Function):
    """Identity with a gradient of two."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class CustomFunction(SwiGLU):
    def forward(self, x):
        return super().forward(DoubleGrad.apply(x))


class Checkpointed(SwiGLU):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Autocast(SwiGLU):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).to(x.dtype)


class ItemInBody(SwiGLU):
    def forward(self, x):
        return super().forward(x) * (1 + x.detach().abs().sum().item() / 100)


class Counting(SwiGLU):
    """Counts the tokens it saw in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.shape[0]
        return super().forward(x)


class Remembering(SwiGLU):
    """Keeps its last output as a Python attribute."""

    last = None

    def forward(self, x):
        y = super().forward(x)
        self.last = y.detach()
        return y


class CallCounting(SwiGLU):
    """Counts its calls in a Python attribute."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def with_forward_hook(loop):
    module = loop()
    module.experts[1].register_forward_hook(lambda _module, _args, out: out * 2)
    return module


def with_pre_hook(loop):
    module = loop()
    module.experts[1].register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    return module


def with_hook_on_every_expert(loop):
    """The same hook everywhere: a body like any other, if it is traced."""
    module = loop()
    for expert in module.experts:
        expert.register_forward_hook(lambda _module, _args, out: out * 2)
    return module


def with_backward_hook(loop):
    module = loop()
    module.experts[1].register_full_backward_hook(lambda _module, grads_in, _grads_out: (grads_in[0] * 2,))
    return module


def with_recording_hook(loop):
    module = loop()
    module.recorded = []
    module.experts[1].register_forward_hook(lambda _module, args, _out: module.recorded.append(args[0].shape[0]))
    return module


# name, rule, expert, whether an exact rewrite is thinkable
BODIES = (
    ("mean_over_tokens", "body_is_row_wise", MeanOverTokens, False),
    ("mean_negative_dim", "body_is_row_wise", MeanNegativeDim, False),
    ("softmax_over_tokens", "body_is_row_wise", SoftmaxOverTokens, False),
    ("cumsum_over_tokens", "body_is_row_wise", CumsumOverTokens, False),
    ("flip_tokens", "body_is_row_wise", FlipTokens, False),
    ("sort_tokens", "body_is_row_wise", SortTokens, False),
    ("roll_tokens", "loop_can_be_traced", RollTokens, False),
    ("attention_among_tokens", "body_is_row_wise", AttentionAmongTokens, False),
    ("global_max", "body_is_row_wise", GlobalMax, False),
    ("divide_by_count", "operations_are_known", DivideByCount, False),
    ("row_number", "operations_are_known", RowNumber, False),
    ("first_row_zero", "no_intermediate_escapes", FirstRowZero, False),
    ("retiled", "body_is_row_wise", Retiled, False),
    ("batch_norm", "loop_can_be_traced", BatchNormed, False),
    ("in_place_on_row", "no_intermediate_escapes", InPlaceOnRow, False),
    ("dropout", "body_is_row_wise", Dropped, False),
    ("noise", "body_is_row_wise", Noisy, False),
    ("random_leaky", "body_is_row_wise", RandomLeaky, False),
    ("detached_input", "body_is_row_wise", DetachedInput, True),
    ("detached_gate", "body_is_row_wise", DetachedGate, False),
    ("no_grad_gate", "grad_mode_is_constant", NoGradGate, False),
    ("tensor_hook", "operations_are_known", TensorHook, False),
    ("custom_function", "operations_are_known", CustomFunction, False),
    ("checkpoint", "operations_are_known", Checkpointed, False),
    ("autocast", "autocast_is_constant", Autocast, False),
    ("item_in_body", "loop_can_be_traced", ItemInBody, False),
    ("counting_buffer", "no_intermediate_escapes", Counting, True),
    ("remembered_output", "no_intermediate_escapes", Remembering, False),
    ("top_tokens", "no_intermediate_escapes", TopTokens, False),
)

HOOKS = (
    ("forward_hook", "bodies_are_isomorphic", with_forward_hook, False),
    ("pre_hook", "bodies_are_isomorphic", with_pre_hook, False),
    ("backward_hook", "loop_can_be_traced", with_backward_hook, False),
    ("recording_hook", "no_intermediate_escapes", with_recording_hook, False),
    ("hook_on_every_expert", "operations_are_known", with_hook_on_every_expert, True),
)

MISSES = (
    *(NearMiss(f"range_{name}", rule, partial(RangeLoop, expert), may) for name, rule, expert, may in BODIES),
    *(NearMiss(f"hit_{name}", rule, partial(HitLoop, expert), may) for name, rule, expert, may in BODIES),
    *(NearMiss(f"range_{name}", rule, partial(make, RangeLoop), may) for name, rule, make, may in HOOKS),
    *(NearMiss(f"hit_{name}", rule, partial(make, HitLoop), may) for name, rule, make, may in HOOKS),
    NearMiss("range_call_counting", "loop_changes_no_python_state", partial(RangeLoop, CallCounting), may_rewrite=True),
    NearMiss("hit_call_counting", "loop_changes_no_python_state", partial(HitLoop, CallCounting)),
)
