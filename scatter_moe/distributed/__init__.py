"""More than one GPU: experts divided among ranks, on torch.distributed alone."""

from scatter_moe.distributed.checkpoint import per_expert_state_dict
from scatter_moe.distributed.clip_grad import clip_grad_norm_
from scatter_moe.distributed.expert_parallel import ExpertParallel

__all__ = ["ExpertParallel", "clip_grad_norm_", "per_expert_state_dict"]
