"""transformers' expert parallelism with our exchange: Qwen3-MoE's experts, in float64, against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import scatter_moe  # noqa: F401  (registers both implementations)
from tests.distributed.layouts import LAYOUTS, D, Layout, batch, spread
from tests.distributed.pool import WORLD_SIZE

pytest.importorskip("transformers", minversion="5.21", reason="EPImplementationInterface is newer")

PLAN = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm", "experts": "ep_dispatch_experts"}


def model(num_experts: int, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=4, num_experts=num_experts)
    config._experts_implementation = implementation
    holder = nn.Module()
    holder.experts = Qwen3MoeExperts(config).double()
    for parameter in holder.parameters():
        nn.init.normal_(parameter)
    return holder


def on_rank(layout: Layout, implementation: str, shared_batch: bool) -> dict[str, Tensor]:
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    holder = model(layout.num_experts, implementation)
    mesh = init_device_mesh("cpu", (WORLD_SIZE, 1), mesh_dim_names=("ep", "alone"))
    tp_mesh = mesh["ep"] if shared_batch else mesh["alone"]
    apply_expert_parallelism(holder, mesh["ep"], tp_mesh, PLAN, "scatter_moe")
    given = batch(layout, 0 if shared_batch else dist.get_rank())
    y = holder.experts(given.x, given.ids, given.weights)
    y.backward(given.upstream)
    grads = {name: parameter.grad.full_tensor() for name, parameter in holder.named_parameters()}
    return {"y": y.detach(), "x": given.x.grad, "weights": given.weights.grad, **grads}


def in_one_process(layout: Layout, rank: int, holder: nn.Module) -> dict[str, Tensor]:
    given = batch(layout, rank)
    y = holder.experts(given.x, given.ids, given.weights)
    y.backward(given.upstream)
    return {"y": y.detach(), "x": given.x.grad, "weights": given.weights.grad}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() >= expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", ["eager", "scatter_moe"])
@pytest.mark.parametrize(
    "layout", [spread(8, 2, (1, 9, 3, 4)), LAYOUTS["all tokens to one rank"]], ids=["spread", "one"]
)
def test_own_batches(pool, layout, implementation):
    holder = model(layout.num_experts, implementation)
    expected = [in_one_process(layout, rank, holder) for rank in range(WORLD_SIZE)]
    grads = {name: parameter.grad for name, parameter in holder.named_parameters()}
    for got, of_rank in zip(pool.run(on_rank, layout, implementation, False), expected, strict=True):
        assert_close(got, of_rank | grads)


def test_shared_batch(pool):
    layout = LAYOUTS["even"]
    holder = model(layout.num_experts, "eager")
    expected = in_one_process(layout, 0, holder)
    grads = {name: parameter.grad for name, parameter in holder.named_parameters()}
    for got in pool.run(on_rank, layout, "eager", True):
        assert_close(got, expected | grads)
