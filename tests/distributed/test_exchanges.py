"""Both exchanges against one process that has all tokens and all experts: outputs and every gradient, in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from scatter_moe import ExpertMLP, ExpertParallel
from tests.distributed.layouts import LAYOUTS, MOST_TOKENS, D, Layout, batch
from tests.distributed.pool import WORLD_SIZE, Pool

EXCHANGES = ("all_to_all", "all_gather")


def stacked(num_experts: int, weight_on: str = "output") -> nn.Module:
    torch.manual_seed(0)
    return ExpertMLP(num_experts, D, 5, bias=True, weight_on=weight_on, dtype=torch.float64)


def listed(num_experts: int) -> nn.ModuleList:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, D)) for _ in range(num_experts)]
    return nn.ModuleList(experts).double()


def loop(experts: nn.ModuleList, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token: what a divided list must equal."""
    out = torch.zeros_like(x)
    for index, expert in enumerate(experts):
        out = out + expert(x) * (weights * (ids == index)).sum(1, keepdim=True)
    return out


def separate(num_experts: int) -> nn.Module:
    torch.manual_seed(0)
    return ExpertMLP(num_experts, D, 4, layout="separate", bias=True, dtype=torch.float64)


def on_rank(make: Callable[..., nn.Module], exchange: str, layout: Layout, columns: int = 1) -> dict[str, Tensor]:
    """columns: the ranks that divide those of an expert; they have the tokens of the first of them."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE // columns, columns), mesh_dim_names=("ep", "tp"))
    style = ExpertParallel(exchange, max_tokens=MOST_TOKENS)
    experts = parallelize_module(make(layout.num_experts), mesh if columns > 1 else mesh["ep"], style)
    given = batch(layout, dist.get_rank() // columns)
    y = experts(given.x, given.ids, given.weights)
    y.backward(given.upstream)
    results = {"y": y.detach(), "x": given.x.grad, "weights": given.weights.grad}
    for name, parameter in experts.named_parameters():
        results[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return results


def in_one_process(
    make: Callable[..., nn.Module], run: Callable[..., Tensor], layout: Layout, num_ranks: int
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Results of each rank's tokens, and the parameters' gradients of the mean of the ranks' losses."""
    experts = make(layout.num_experts)
    ranks = []
    for rank in range(num_ranks):
        given = batch(layout, rank)
        y = run(experts, given.x, given.ids, given.weights)
        y.backward(given.upstream)
        ranks.append({"y": y.detach(), "x": given.x.grad, "weights": given.weights.grad})
    return ranks, {name: parameter.grad / num_ranks for name, parameter in experts.named_parameters()}


def assert_equal(
    pool: Pool,
    make: Callable[..., nn.Module],
    run: Callable[..., Tensor],
    exchange: str,
    layout: Layout,
    columns: int = 1,
) -> None:
    expected, parameters = in_one_process(make, run, layout, WORLD_SIZE // columns)
    seen = set()
    for rank, got in enumerate(pool.run(on_rank, make, exchange, layout, columns)):
        of_rank = expected[rank // columns]
        seen |= got.keys() - of_rank.keys()
        for name, tensor in got.items():
            reference = of_rank[name] if name in of_rank else parameters[name]
            torch.testing.assert_close(tensor, reference, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert seen == parameters.keys()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_experts_on_four_ranks_equal_one_process(pool, exchange, layout):
    assert_equal(pool, stacked, lambda experts, *given: experts(*given), exchange, layout)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", ["even", "uneven experts", "all tokens to one rank", "tokens differ by rank"])
def test_list_of_experts_on_four_ranks_equals_a_loop(pool, exchange, name):
    assert_equal(pool, listed, loop, exchange, LAYOUTS[name])


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", ["even", "fewer experts than ranks", "tokens differ by rank", "K = 8", "no tokens"])
def test_experts_and_columns_on_four_ranks_equal_one_process(pool, exchange, name):
    assert_equal(pool, separate, lambda experts, *given: experts(*given), exchange, LAYOUTS[name], columns=2)


def test_columns_alone_on_four_ranks_equal_one_process(pool):
    layout = LAYOUTS["uneven experts"]
    assert_equal(pool, separate, lambda experts, *given: experts(*given), "auto", layout, columns=WORLD_SIZE)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    num_experts, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    row = st.tuples(*[st.integers(-1, num_experts)] * top_k)
    ids = [tuple(draw(st.lists(row, max_size=MOST_TOKENS))) for _ in range(WORLD_SIZE)]
    return Layout(num_experts, top_k, tuple(ids))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_any_routing(pool, exchange):
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(layouts())
    def check(layout):
        assert_equal(pool, stacked, lambda experts, *given: experts(*given), exchange, layout)

    check()


def count_rows_sent(layout: Layout) -> int:
    """Rows of x that leave this rank's forward, itself included."""
    rows = []
    before = dist.all_to_all_single

    def counting(into, tensor, *sizes, **options):
        rows.append(len(tensor))
        return before(into, tensor, *sizes, **options)

    dist.all_to_all_single = counting
    try:
        on_rank(stacked, "all_to_all", layout)
    finally:
        dist.all_to_all_single = before
    _sizes, of_x, *_ = rows
    return of_x


@pytest.mark.parametrize("name", ["K = E", "all tokens to one rank", "sentinels"])
def test_all_to_all_sends_a_token_once_to_each_rank_that_needs_it(pool, name):
    layout = LAYOUTS[name]
    per_rank = layout.num_experts // WORLD_SIZE
    needed = [
        sum(len({e // per_rank for e in row if 0 <= e < layout.num_experts}) for row in rows) for rows in layout.ids
    ]
    assert pool.run(count_rows_sent, layout) == needed
