"""scatter_moe::mlp_backward_: mlp_backward which leaves anything in h, whose memory the gradient of h may take.

The backward pass of mlp calls it where h is read for the last time. Saving h twice over would be the largest item of a
training step's peak memory.
"""

import torch
from torch import Tensor

from registrations.library import define, fake, flops, kernels, not_differentiable
from registrations.mlp_backward import SECOND_DERIVATIVES, SIGNATURE, mlp_backward_fake, mlp_backward_flops
from scatter_ops import checks, cpu

define(f"mlp_backward_(Tensor grad_out, Tensor(a!) h, Tensor? y, {SIGNATURE}")


def mlp_backward_cpu(*arguments) -> tuple[Tensor, ...]:
    _mark_as_changed(arguments[1])
    return cpu.mlp_backward(*arguments, overwrite_h=True)


def mlp_backward_cuda(*arguments) -> tuple[Tensor, ...]:
    from scatter_ops import cuda  # Triton is needed only once there is something to run on a GPU

    _mark_as_changed(arguments[1])
    return cuda.mlp_backward(*arguments, overwrite_h=True)


def _mark_as_changed(h: Tensor) -> None:
    """Whoever else saved h for a backward pass is told so, instead of reading something else."""
    if not h.is_inference():
        torch.autograd.graph.increment_version(h)


kernels("mlp_backward_", checks.mlp_backward, mlp_backward_cpu, mlp_backward_cuda)
fake("mlp_backward_", checks.mlp_backward)(mlp_backward_fake)
not_differentiable("mlp_backward_", SECOND_DERIVATIVES)
flops("mlp_backward_")(mlp_backward_flops)
