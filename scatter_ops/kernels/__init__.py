"""Triton kernels. Each module here needs triton; nothing outside scatter_ops.cuda imports them."""
