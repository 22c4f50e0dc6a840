"""The specification of every operator in plain PyTorch: obviously right, slow, on any device.

Products and sums are accumulated in float32 (float64 for float64) and rounded once. A slot is one (token, expert)
pair, slot n = t * K + k. Rows are either in slot order ("scattered") or sorted by expert ("grouped"); order maps the
one to the other: grouped row i belongs to slot order[i]. Slots whose id is not an expert (sentinels) come last and
give exact zeros.
"""

from scatter_ops.reference.adapted_linear import adapted_linear_forward, adapted_linear_grads
from scatter_ops.reference.linear import parallel_linear, parallel_linear_bias_grad, parallel_linear_weight_grad
from scatter_ops.reference.mlp import mlp_backward, mlp_forward
from scatter_ops.reference.routing import combine, combine_backward, dispatch, expand, expand_backward, route

__all__ = [
    "adapted_linear_forward",
    "adapted_linear_grads",
    "combine",
    "combine_backward",
    "dispatch",
    "expand",
    "expand_backward",
    "mlp_backward",
    "mlp_forward",
    "parallel_linear",
    "parallel_linear_bias_grad",
    "parallel_linear_weight_grad",
    "route",
]
