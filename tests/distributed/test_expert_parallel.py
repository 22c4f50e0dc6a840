"""What `ExpertParallel` accepts, what "auto" chooses, and experts whose weights somebody else has sharded."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from scatter_moe import ExpertMLP, ExpertParallel
from scatter_moe.distributed.exchange import Exchange
from scatter_moe.distributed.partition import Partition
from tests.distributed.layouts import D
from tests.distributed.pool import WORLD_SIZE

E, ROWS = 8, 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"exchange": "ring"}, "exchange"), ({"max_tokens": 0}, "max_tokens"), ({"gradients": "max"}, "gradients")],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        ExpertParallel(**settings)


@pytest.mark.parametrize("num_experts", range(1, 12))
@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_partition_is_that_of_chunk(num_experts, num_ranks):
    chunks = torch.arange(num_experts).chunk(num_ranks)
    for rank in range(num_ranks):
        partition = Partition(num_experts, num_ranks, rank)
        mine = range(partition.first, partition.first + partition.num_local)
        assert list(mine) == (chunks[rank].tolist() if rank < len(chunks) else [])
        ids = torch.tensor([list(mine)], dtype=torch.int64)
        assert partition.owner(ids).tolist() == [[rank] * partition.num_local]
        assert partition.local(ids).tolist() == [list(range(partition.num_local))]


@pytest.mark.parametrize(
    ("num_ranks", "top_k", "max_tokens", "gathers"),
    [(2, 8, 64, True), (2, 1, 64, True), (2, 8, None, False), (4, 8, 64, True), (4, 4, 64, False), (8, 8, 64, False)],
)
def test_auto_gathers_where_few_more_rows_are_sent_and_the_number_of_tokens_is_bounded(
    num_ranks, top_k, max_tokens, gathers
):
    exchange = Exchange(None, Partition(64, num_ranks, 0), "auto", max_tokens)
    assert exchange._gathers(top_k) is gathers


def refusals() -> list[str]:
    """Messages of what is refused."""
    line = init_device_mesh("cpu", (WORLD_SIZE,))
    square = init_device_mesh("cpu", (2, 2))
    named = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    experts = ExpertMLP(E, D, 4)
    five_wide = ExpertMLP(E, D, 5, layout="separate")
    few = nn.ModuleList([nn.Linear(D, D) for _ in range(5)])
    attempts = [
        lambda: parallelize_module(nn.Linear(D, D), line, ExpertParallel()),
        lambda: ExpertParallel()._apply(experts, square),
        lambda: parallelize_module(experts, named, ExpertParallel()),
        lambda: parallelize_module(five_wide, named, ExpertParallel()),
        lambda: parallelize_module(nn.ModuleList(few[:4]), named, ExpertParallel()),
        lambda: parallelize_module(few, line, ExpertParallel()),
        lambda: sharded(experts, 1).forward_grouped(torch.randn(2, D), torch.tensor([1, 1])),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def test_other_modules_meshes_and_shardings_are_refused(pool):
    for messages in pool.run(refusals):
        subjects = [message.split(":")[0] for message in messages]
        assert subjects == ["module", *["device_mesh"] * 4, "module", "parameters"]


def sharded(experts: ExpertMLP, dim: int) -> ExpertMLP:
    """As a trainer's own expert parallelism leaves them."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for name, parameter in list(experts.named_parameters()):
        experts.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(dim)])))
    return experts


def grouped_rows(rank: int) -> Tensor:
    return torch.randn(2 * ROWS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def grouped() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    experts = sharded(ExpertMLP(E, D, 4, dtype=torch.float64), 0)
    y = experts.forward_grouped(grouped_rows(dist.get_rank()), torch.tensor([ROWS, ROWS]))
    y.square().sum().backward()
    return y.detach(), {name: parameter.grad.full_tensor() for name, parameter in experts.named_parameters()}


def test_rows_that_a_trainer_has_dispatched_go_to_the_local_experts(pool):
    torch.manual_seed(0)
    experts = ExpertMLP(E, D, 4, dtype=torch.float64)
    rows = torch.cat([grouped_rows(rank) for rank in range(WORLD_SIZE)])
    expected = experts.forward_grouped(rows, torch.full((E,), ROWS))
    expected.square().sum().backward()
    for rank, (y, grads) in enumerate(pool.run(grouped)):
        torch.testing.assert_close(y, expected.detach()[2 * ROWS * rank :][: 2 * ROWS], rtol=1e-9, atol=1e-9)
        for name, parameter in experts.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-9)
