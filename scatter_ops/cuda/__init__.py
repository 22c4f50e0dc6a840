"""Launchers of the Triton kernels: the same functions with the same signatures as scatter_ops.reference.

Without triton (macOS, Windows) this imports, and calling a function raises.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    _REASON = str(error)

    def _unavailable(*args, **kwargs):
        raise RuntimeError(f"scatter_moe's CUDA kernels need triton, which can't be imported here: {_REASON}")

    route = dispatch = combine = combine_backward = expand = expand_backward = _unavailable
    parallel_linear = parallel_linear_weight_grad = parallel_linear_bias_grad = _unavailable
    mlp_forward = mlp_backward = _unavailable
else:
    from scatter_ops.cuda.linear import parallel_linear, parallel_linear_bias_grad, parallel_linear_weight_grad
    from scatter_ops.cuda.mlp_backward import mlp_backward
    from scatter_ops.cuda.mlp_forward import mlp_forward
    from scatter_ops.cuda.routing import route
    from scatter_ops.cuda.rows import combine, combine_backward, dispatch, expand, expand_backward

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
