"""`hopper`: the launches of Hopper's kernels; None with a Triton whose Gluon, which is experimental, is another one."""

try:
    from scatter_ops.cuda import hopper
except ImportError:
    hopper = None

__all__ = ["hopper"]
