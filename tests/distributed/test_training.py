"""Twenty optimizer steps on four processes equal those of one process that averages the losses, in float64.

Layouts, exchanges, numbers of experts, of experts per token and of tokens, and routing: every two values of different
columns of the table meet in one run.
"""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import scatter_moe
from tests.distributed.models import MOST_TOKENS, PARALLEL, SAME_TOKENS, DrawnRouter, loss, model, tokens
from tests.distributed.pool import WORLD_SIZE

STEPS = 20
MAX_NORM = 0.05


class Run(NamedTuple):
    """num_experts: 8 on four ranks are even, 10 uneven, and with 9 a rank has none. num_tokens: "differ" by rank, zero
    included. routing: the router's own choice, drawn, to the experts of one rank, or to none of the last rank's.
    """

    layout: str
    exchange: str
    num_experts: int
    top_k: int
    num_tokens: str
    routing: str


TABLE = Run(
    list(PARALLEL),
    ["all_to_all", "all_gather"],
    [8, 9, 10],
    [1, 2, 8],
    ["the same", "differ"],
    ["router", "drawn", "one rank", "not the last"],
)


def pairs(run: tuple) -> set[tuple]:
    return set(combinations(enumerate(run), 2))


def pairwise(table: tuple) -> Iterator[Run]:
    """Rows that cover all pairs: each the one that covers most of those that are left."""
    rows = [Run(*row) for row in product(*table)]
    left = set().union(*map(pairs, rows))
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        left -= pairs(best)
        yield best


RUNS = list(pairwise(TABLE))
SLOW = {run for run in RUNS if run is not next(other for other in RUNS if other.layout == run.layout)}


def test_every_two_values_meet():
    met = set().union(*map(pairs, RUNS))
    assert met == set().union(*(pairs(row) for row in product(*TABLE)))


def experts_for(run: Run) -> list[int]:
    """Those that tokens are sent to."""
    per_rank = -(-run.num_experts // WORLD_SIZE)
    first = {"drawn": run.num_experts, "one rank": per_rank, "not the last": run.num_experts - per_rank}[run.routing]
    return list(range(max(first, run.top_k)))


def batch(run: Run, rank: int, step: int) -> tuple[Tensor, Tensor]:
    return tokens(rank, step if run.num_tokens == "differ" else MOST_TOKENS - 1 - rank)


def send(run: Run, network: nn.Module, rank: int, step: int) -> None:
    """Tells the routers where to, unless they choose themselves."""
    generator = torch.Generator().manual_seed(1000 + WORLD_SIZE * step + rank)
    for router in network.modules():
        if isinstance(router, DrawnRouter):
            count, experts = len(batch(run, rank, step)[0]), torch.tensor(experts_for(run))
            router.ids = experts[torch.rand(count, len(experts), generator=generator).argsort(1)[:, : run.top_k]]


def settings(run: Run) -> dict[str, Any]:
    return {"num_experts": run.num_experts, "top_k": run.top_k, "drawn": run.routing != "router"}


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


def train_on_rank(run: Run) -> tuple[dict[str, Tensor], list[float]]:
    parallel = PARALLEL[run.layout](run.exchange, **settings(run))
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    rank = dist.get_rank() // SAME_TOKENS.get(run.layout, 1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        send(run, parallel, rank, step)
        loss(parallel, *batch(run, rank, step)).backward()
        if run.layout in ("EP", "TP", "EP and TP"):
            average_plain_gradients(parallel)
        norms.append(scatter_moe.clip_grad_norm_(parallel, MAX_NORM).item())
        optimizer.step()
    return named(parallel), norms


def train_in_one_process(run: Run) -> tuple[dict[str, Tensor], list[float]]:
    single = model(**settings(run))
    optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
    num_ranks = WORLD_SIZE // SAME_TOKENS.get(run.layout, 1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(num_ranks):
            send(run, single, rank, step)
            (loss(single, *batch(run, rank, step)) / num_ranks).backward()
        norms.append(nn.utils.clip_grad_norm_(single.parameters(), MAX_NORM).item())
        optimizer.step()
    return named(single), norms


@pytest.mark.parametrize(
    "run", [pytest.param(run, id="-".join(map(str, run)), marks=[pytest.mark.slow] * (run in SLOW)) for run in RUNS]
)
def test_twenty_steps_equal_one_process(pool, run):
    expected, norms = train_in_one_process(run)
    assert max(norms) > MAX_NORM, "nothing was clipped"
    for got, got_norms in pool.run(train_on_rank, run):
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(got_norms, norms, rtol=1e-9, atol=1e-9)
