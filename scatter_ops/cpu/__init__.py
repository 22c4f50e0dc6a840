"""Fast CPU implementation of the operators: the functions and signatures of `scatter_ops.reference`.

Rows are grouped by one gather, each expert with tokens is one GEMM on a slice of them, weights are read where they are.
"""

from scatter_ops.cpu.adapted_linear import adapted_linear_forward, adapted_linear_grads
from scatter_ops.cpu.linear import parallel_linear, parallel_linear_bias_grad, parallel_linear_weight_grad
from scatter_ops.cpu.mlp_backward import mlp_backward
from scatter_ops.cpu.mlp_forward import mlp_forward
from scatter_ops.cpu.routing import combine, combine_backward, dispatch, expand, expand_backward, route

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
