"""Wrong arguments: the error names the argument, what was given and what is accepted, on real and on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scatter_ops.checks import tensors as accepted_tensors
from tests.ops.cases import GROUPED, OPS, SCATTERED, SILU, Case, map_tensors

LINEAR, LIST = (
    Case("parallel_linear", bias=True, options=SCATTERED),
    Case("parallel_linear", parameters="list", options=GROUPED),
)
ADAPTED, ADAPTED_GRADS = (
    Case("adapted_linear", bias=True, options=SCATTERED),
    Case("adapted_linear_grads", options=SCATTERED),
)
COMBINE, EXPAND = Case("combine", options={"grouped_in": True}), Case("expand", parameters="list")
MLP, ROUTE, DISPATCH = Case("mlp", bias=True, options=SILU), Case("route"), Case("dispatch")
SEPARATE = Case("mlp", bias=True, options={"activation": "silu", "layout": "separate"})
BACKWARD = Case("mlp_backward", options=SILU)


def first(change):
    """Change the first tensor of a list."""
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


# operator, position of the argument, how it is changed, the exception, what its message must say
MISTAKES = [
    (ROUTE, 0, lambda ids: ids.float(), TypeError, "topk_ids: got torch.float32"),
    (ROUTE, 0, lambda ids: ids.flatten(), ValueError, r"topk_ids: got shape \(14,\)"),
    (ROUTE, 1, lambda _: 0, ValueError, "num_experts: got 0"),
    (DISPATCH, 0, lambda x: x[1:], ValueError, "x: got 6 rows, accepted is 7"),
    (DISPATCH, 1, lambda order: order.long(), TypeError, "order: got torch.int64, accepted are torch.int32"),
    (DISPATCH, 2, lambda offsets: offsets.float(), TypeError, "offsets: got torch.float32"),
    (DISPATCH, 3, lambda _: 0, ValueError, "top_k: got 0"),
    (DISPATCH, 3, lambda _: 3, ValueError, "top_k: got 3, accepted is a divisor of the number of slots 14"),
    (LINEAR, 0, lambda x: x[0], ValueError, "x: got shape"),
    (LINEAR, 0, lambda x: x.long(), TypeError, "x: got torch.int64"),
    (LINEAR, 0, lambda x: x[:, 1:], ValueError, "x: got 4 columns, accepted is 5"),
    (LINEAR, 0, lambda x: x[1:], ValueError, "x: got 6 rows, accepted is 7"),
    (LINEAR, 1, lambda _: [], ValueError, "weight: got an empty list"),
    (
        LINEAR,
        1,
        first(lambda w: w.bfloat16()),
        TypeError,
        "weight: got torch.bfloat16, accepted is x's dtype torch.float32",
    ),
    (LINEAR, 1, first(lambda w: w[1:]), ValueError, "weight: got 3 experts, accepted is 4"),
    (LINEAR, 1, first(lambda w: w[None]), ValueError, "weight: got shape"),
    (LINEAR, 1, lambda w: w * 2, ValueError, "weight: got shape"),
    (LINEAR, 7, first(lambda b: b[:, 1:]), ValueError, "bias: got 2 columns, accepted is 3"),
    (LINEAR, 7, first(lambda b: b[1:]), ValueError, "bias: got 3 experts, accepted is 4"),
    (LINEAR, 7, first(lambda b: b.bfloat16()), TypeError, "bias: got torch.bfloat16"),
    (LIST, 0, lambda x: x[1:], ValueError, "x: got 13 rows, accepted is 14"),
    (LIST, 1, lambda w: w[:-1], ValueError, "weight: got 3 experts, accepted is 4"),
    (LIST, 1, lambda w: [*w[:-1], w[-1][1:]], ValueError, r"weight\[3\]: got \(2, 5\)"),
    (LIST, 1, lambda w: [*w[:-1], w[-1].bfloat16()], ValueError, r"weight\[3\]: got \(3, 5\) torch.bfloat16"),
    (ADAPTED, 0, lambda x: x[:, 1:], ValueError, "x: got 4 columns, accepted is 5"),
    (ADAPTED, 1, lambda w: w[0], ValueError, r"weight: got shape \(3, 5\)"),
    (ADAPTED, 2, lambda lhs: lhs[0], ValueError, r"lhs: got shape \(3, 2\)"),
    (ADAPTED, 2, lambda lhs: lhs[1:], ValueError, "lhs: got 3 experts, accepted is 4"),
    (ADAPTED, 2, lambda lhs: lhs[:, 1:], ValueError, "lhs: got 2 rows, accepted is 3"),
    (ADAPTED, 2, lambda lhs: lhs.bfloat16(), TypeError, "lhs: got torch.bfloat16"),
    (ADAPTED, 3, lambda rhs: rhs[:, 1:], ValueError, "rhs: got 1 rows, accepted is 2"),
    (ADAPTED, 3, lambda rhs: rhs[..., 1:], ValueError, "rhs: got 4 columns, accepted is 5"),
    (ADAPTED, 10, first(lambda b: b[:, 1:]), ValueError, "bias: got 2 columns, accepted is 3"),
    (ADAPTED_GRADS, 1, lambda grad: grad[1:], ValueError, "grad: got 13 rows, accepted is 14"),
    (ADAPTED_GRADS, 3, lambda rhs: rhs[..., 1:], ValueError, "rhs: got 4 columns, accepted is 5"),
    (COMBINE, 0, lambda y: y[1:], ValueError, "y: got 13 rows, accepted is 14"),
    (COMBINE, 1, lambda w: w.long(), TypeError, "topk_weights: got torch.int64"),
    (COMBINE, 1, lambda w: w.t(), ValueError, "topk_weights: got 7 columns, accepted is 2"),
    (COMBINE, 1, lambda w: w[1:], ValueError, "topk_weights: got 12 elements, accepted is 14"),
    (COMBINE, 6, lambda _: torch.int8, TypeError, "out_dtype: got torch.int8"),
    (EXPAND, 0, lambda _: [], ValueError, "param: got an empty list"),
    (EXPAND, 0, lambda param: param[1:], ValueError, "param: got 3 experts, accepted is 4"),
    (EXPAND, 0, lambda param: [*param[:-1], param[0][1:]], ValueError, r"param\[3\]: got \(4,\)"),
    (MLP, 0, lambda x: x[:, 1:], ValueError, "x: got 4 columns, accepted is 5"),
    (MLP, 1, lambda w: w[:, 0], ValueError, "topk_weights: got shape"),
    (MLP, 4, first(lambda w: w[:, 1:]), ValueError, "gate_up: got 5 output width, accepted is 6"),
    (
        MLP,
        5,
        lambda _: [torch.zeros(4, 3, 5)],
        ValueError,
        "up: got 1 tensors with layout 'concat",
    ),
    (MLP, 6, first(lambda w: w[:, 1:]), ValueError, "down: got 4 output width, accepted is 5"),
    (MLP, 9, first(lambda b: b[:, 1:]), ValueError, "down_bias: got 4 columns, accepted is 5"),
    (MLP, 8, lambda _: [torch.zeros(4, 3)], ValueError, "up_bias: got 1 tensors"),
    (MLP, 10, lambda _: "swish", ValueError, "activation: got 'swish', accepted are silu, gelu"),
    (MLP, 11, lambda _: "packed", ValueError, "layout: got 'packed', accepted are plain"),
    (MLP, 13, lambda _: "both", ValueError, "weight_on: got 'both', accepted are output, input"),
    (
        Case("mlp", options=SILU | {"layout": "plain"}),
        10,
        lambda _: "clamped_swiglu",
        ValueError,
        "layout: got 'plain'",
    ),
    (SEPARATE, 5, lambda _: [], ValueError, "up: got 0 tensors with layout 'separate'"),
    (SEPARATE, 5, first(lambda w: w[:, 1:]), ValueError, "up: got 2 output width, accepted is 3"),
    (BACKWARD, -1, lambda needs: needs[1:], ValueError, "needs: got 7 flags"),
    (BACKWARD, 1, lambda h: h[1:], ValueError, "h: got 13 rows"),
    (BACKWARD, 2, lambda y: y[1:], ValueError, "y: got 13 rows"),
]


@pytest.mark.parametrize(
    ("case", "position", "change", "error", "message"), MISTAKES, ids=lambda v: getattr(v, "__name__", str(v)[:40])
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_message_names_the_argument(case, position, change, error, message, fake, device):
    with torch.no_grad():
        arguments = list(case.arguments(dtype=torch.float32, device=device))
        arguments[position] = change(arguments[position])
        arguments = map_tensors(lambda t: t.to(device), tuple(arguments))
        if not fake:
            with pytest.raises(error, match=message):
                getattr(OPS, case.op)(*arguments)
            return
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            arguments = map_tensors(mode.from_tensor, arguments)
            with pytest.raises(error, match=message):
                getattr(OPS, case.op)(*arguments)


def test_too_many_slots():
    with FakeTensorMode(), pytest.raises(ValueError, match="topk_ids: got 2147483648 slots, accepted are at most"):
        OPS.route(torch.empty(2**30, 2, dtype=torch.int64), 8)


@pytest.mark.gpu
def test_devices_must_agree():
    x, *rest = DISPATCH.arguments(device="cuda")
    with pytest.raises(
        ValueError, match="order: got a tensor on cuda:0, accepted is the device of the other arguments"
    ):
        OPS.dispatch(x.cpu(), *rest)


def test_meta_tensors_are_another_device():
    order, offsets = OPS.route(torch.zeros(3, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="order: got a tensor on cpu"):
        accepted_tensors.routing(torch.empty(1, device="meta"), order, offsets)
