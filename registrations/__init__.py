"""PyTorch registrations of the mixture-of-experts operators. Importing this makes `torch.ops.scatter_moe.*` callable.

Each operator has one file with the same sections: schema, kernels, fake, autograd, autocast, FLOPs, sharding.
"""

from registrations import (
    adapted_linear,
    adapted_linear_forward,
    adapted_linear_grads,
    combine,
    combine_backward,
    dispatch,
    expand,
    expand_backward,
    mlp,
    mlp_backward,
    mlp_backward_,
    mlp_forward,
    parallel_linear,
    parallel_linear_bias_grad,
    parallel_linear_weight_grad,
    route,
)
from registrations.library import NAMESPACE

__all__ = [
    "NAMESPACE",
    "adapted_linear",
    "adapted_linear_forward",
    "adapted_linear_grads",
    "combine",
    "combine_backward",
    "dispatch",
    "expand",
    "expand_backward",
    "mlp",
    "mlp_backward",
    "mlp_backward_",
    "mlp_forward",
    "parallel_linear",
    "parallel_linear_bias_grad",
    "parallel_linear_weight_grad",
    "route",
]
