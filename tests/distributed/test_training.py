"""Twenty optimizer steps on four processes equal those of one process that averages the four losses, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import scatter_moe
from scatter_moe.distributed.expert_parallel import Kind
from tests.distributed.models import PARALLEL, loss, model, tokens
from tests.distributed.pool import WORLD_SIZE

STEPS = 20
MAX_NORM = 0.05


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(parameter) for name, parameter in model.named_parameters()}


def average_plain_gradients(model: nn.Module) -> None:
    """What DDP and FSDP do, for parameters that neither has."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD_SIZE


def train_on_rank(layout: str, exchange: Kind) -> tuple[dict[str, Tensor], list[float]]:
    parallel = PARALLEL[layout](exchange)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(parallel, *tokens(dist.get_rank(), step)).backward()
        if layout == "EP":
            average_plain_gradients(parallel)
        norms.append(scatter_moe.clip_grad_norm_(parallel, MAX_NORM).item())
        optimizer.step()
    return named(parallel), norms


def train_in_one_process() -> tuple[dict[str, Tensor], list[float]]:
    single = model()
    optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD_SIZE):
            (loss(single, *tokens(rank, step)) / WORLD_SIZE).backward()
        norms.append(nn.utils.clip_grad_norm_(single.parameters(), MAX_NORM).item())
        optimizer.step()
    return named(single), norms


@pytest.mark.parametrize(
    ("layout", "exchange"),
    [
        ("EP", "all_gather"),
        ("EP and FSDP2", "all_to_all"),
        ("EP and DDP", "auto"),
        pytest.param("EP", "all_to_all", marks=pytest.mark.slow),
        pytest.param("EP and FSDP2", "all_gather", marks=pytest.mark.slow),
        pytest.param("EP and DDP", "all_gather", marks=pytest.mark.slow),
        pytest.param("FSDP2", "auto", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_equal_one_process(pool, layout, exchange):
    expected, norms = train_in_one_process()
    assert max(norms) > MAX_NORM, "nothing was clipped"
    for got, got_norms in pool.run(train_on_rank, layout, exchange):
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(got_norms, norms, rtol=1e-9, atol=1e-9)
