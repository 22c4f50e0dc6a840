"""What each operator computes, as a user would write it: loops over experts, differentiable by PyTorch, in any dtype.

Arguments are the operators'. In float64 this is the truth of the numerical rule, in low precision its yardstick.
"""

import torch
import torch.nn.functional as F


def dispatch(x, order, offsets, top_k):
    out = x.new_zeros(order.numel(), x.shape[1])
    for rows, slots in _experts(order, offsets):
        out = out.index_put((rows,), x[slots // top_k])
    return out


def parallel_linear(x, weight, order, offsets, top_k, grouped_in, grouped_out, bias, transposed=False):
    weight, bias = _per_expert(weight, 2), _per_expert(bias, 1)
    out = x.new_zeros(order.numel(), weight[0].shape[1 if transposed else 0])
    for e, (rows, slots) in enumerate(_experts(order, offsets)):
        x_rows = x[rows] if grouped_in else x[slots // top_k]
        y = F.linear(x_rows, weight[e].t() if transposed else weight[e], bias[e] if bias else None)
        out = out.index_put((rows if grouped_out else slots,), y)
    return out


def adapted_linear(x, weight, lhs, rhs, order, offsets, scale, top_k, grouped_in, grouped_out, bias, transposed=False):
    """As peft adapts experts."""
    adapted = torch.baddbmm(weight, lhs, rhs, alpha=scale)
    return parallel_linear(x, [adapted], order, offsets, top_k, grouped_in, grouped_out, bias, transposed)


def combine(y, topk_weights, order, offsets, top_k, grouped_in, out_dtype=None):
    out = y.new_zeros(order.numel() // top_k, y.shape[1])
    if not grouped_in:
        slots = torch.arange(order.numel(), device=y.device)
        pairs = [(slots, slots)]
    else:
        pairs = _experts(order, offsets)
    for rows, slots in pairs:
        values = y[rows] if topk_weights is None else y[rows] * topk_weights.flatten()[slots, None]
        out = out.index_add(0, slots // top_k, values.to(out.dtype))
    return out.to(out_dtype or y.dtype)


def expand(param, offsets, num_rows, out_dtype=None):
    param = param[0] if len(param) == 1 else param
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    parts = [param[e].expand(size, *param[e].shape) for e, size in enumerate(sizes)]
    return torch.cat([*parts, param[0].new_zeros(num_rows - sum(sizes), *param[0].shape)]).to(out_dtype)


def mlp(
    x,
    topk_weights,
    order,
    offsets,
    gate_up,
    up,
    down,
    gate_up_bias,
    up_bias,
    down_bias,
    activation,
    layout,
    transposed=False,
    weight_on="output",
    alpha=1.702,
    limit=7.0,
    out_dtype=None,
):
    gate_up, up, down = (_per_expert(parameter, 2) for parameter in (gate_up, up, down))
    gate_up_bias, up_bias, down_bias = (_per_expert(parameter, 1) for parameter in (gate_up_bias, up_bias, down_bias))
    out = torch.zeros_like(x, dtype=out_dtype)

    def linear(rows, weight, bias, e):
        return F.linear(rows, weight[e].t() if transposed else weight[e], bias[e] if bias else None)

    for e, (_, slots) in enumerate(_experts(order, offsets)):
        tokens, scale = slots // topk_weights.shape[1], topk_weights.flatten()[slots, None]
        rows = x[tokens] if weight_on == "output" else (x[tokens] * scale).to(x.dtype)
        h = linear(rows, gate_up, gate_up_bias, e)
        h_up = linear(rows, up, up_bias, e) if layout == "separate" else None
        y = linear(_activate(h, h_up, activation, layout, alpha, limit), down, down_bias, e)
        y = y * scale if weight_on == "output" else y
        out = out.index_add(0, tokens, y.to(out.dtype))
    return out


def _activate(h, h_up, activation, layout, alpha, limit):
    gate, up = h, h_up
    if layout == "concatenated":
        gate, up = h.chunk(2, dim=-1)
    elif layout == "interleaved":
        gate, up = h[:, ::2], h[:, 1::2]
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    function = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda g: F.relu(g).square(),
    }[activation]
    return function(gate) if up is None else function(gate) * up


def _per_expert(parameter, dims):
    return list(parameter[0]) if len(parameter) == 1 and parameter[0].dim() == dims + 1 else list(parameter)


def _experts(order, offsets):
    """Grouped rows and slots of each expert."""
    ends = offsets.tolist()
    rows = torch.arange(order.numel(), device=order.device)
    return [(rows[start:end], order[start:end].long()) for start, end in zip([0, *ends], ends, strict=False)]
