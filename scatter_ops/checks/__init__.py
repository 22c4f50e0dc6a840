"""Errors for wrong arguments of the operators, each naming the argument, what was given and what is accepted.

Called before any implementation and while tracing. One function per operator, with the operator's own arguments; raises
TypeError for a wrong dtype and ValueError for anything else. Nothing here reads a tensor's values.
"""

from scatter_ops.checks.linear import (
    adapted_linear_forward,
    adapted_linear_grads,
    parallel_linear,
    parallel_linear_bias_grad,
    parallel_linear_weight_grad,
)
from scatter_ops.checks.mlp import mlp_backward, mlp_forward, mlp_options
from scatter_ops.checks.routing import combine, combine_backward, dispatch, expand, expand_backward, route

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
    "mlp_options",
    "parallel_linear",
    "parallel_linear_bias_grad",
    "parallel_linear_weight_grad",
    "route",
]
