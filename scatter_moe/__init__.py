"""scatter-moe: rewrites naive Mixture-of-Experts loops to grouped GEMM kernels.

    torch.compile(model, backend="scatter_moe")

Importing this package registers `torch.ops.scatter_moe.*` and the backend. An installed package needs no import:
torch.compile finds the backend by its entry point.
"""

from importlib.metadata import entry_points

from torch._dynamo import register_backend

from fx_passes.entry.backend import backend, install
from fx_passes.entry.pre_grad import pre_grad_pass
from fx_passes.entry.prepared import prepare
from scatter_moe import routers
from scatter_moe.attention import KVCache, MixtureOfAttention
from scatter_moe.dispatch import Dispatch
from scatter_moe.distributed import ExpertParallel, clip_grad_norm_, per_expert_state_dict
from scatter_moe.expert_mlp import ExpertMLP
from scatter_moe.explain import Explanation, explain
from scatter_moe.from_modules import ExpertList, from_modules
from scatter_moe.moe import MoE
from scatter_moe.parallel_linear import ParallelLinear
from scatter_moe.parameters import expert_parameters, router_parameters, set_dropout
from scatter_moe.peft import extend_when_imported
from scatter_moe.stack_experts import stack_experts
from scatter_moe.transformers import register_when_imported

__all__ = [
    "Dispatch",
    "ExpertList",
    "ExpertMLP",
    "ExpertParallel",
    "Explanation",
    "KVCache",
    "MixtureOfAttention",
    "MoE",
    "ParallelLinear",
    "backend",
    "clip_grad_norm_",
    "expert_parameters",
    "explain",
    "from_modules",
    "per_expert_state_dict",
    "pre_grad_pass",
    "prepare",
    "router_parameters",
    "routers",
    "set_dropout",
    "stack_experts",
]

install()
register_when_imported()
extend_when_imported()
if not entry_points(group="torch_dynamo_backends", name="scatter_moe"):
    register_backend(compiler_fn=backend, name="scatter_moe")
