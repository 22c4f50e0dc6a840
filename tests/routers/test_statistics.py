"""Statistics count what the routing says, inside a compiled graph too, and never wait for the device."""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scatter_moe.routers import (
    CapacityRouter,
    GShardRouter,
    History,
    RouterStatistics,
    Routing,
    SigmoidRouter,
    TopKRouter,
    track,
)

T, D, E, K = 32, 16, 8, 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_counts_are_those_of_a_hand_made_routing():
    ids = torch.tensor([[0, 1], [0, 5], [2, 4]])  # 4 and 5 are sentinels of four experts
    probabilities = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    statistics = RouterStatistics(4)
    statistics(Routing(torch.ones(3, 2), ids, probabilities.log()))
    snapshot = statistics.snapshot()
    assert snapshot.tokens_per_expert.tolist() == [2, 1, 1, 0]
    assert snapshot.entropy.item() == pytest.approx((math.log(2) + math.log(4) + 0) / 3)
    assert snapshot.dropped_share.item() == pytest.approx(2 / 6)
    assert snapshot.dead_experts.item() == 1


def test_counts_add_up_until_a_reset_and_snapshots_keep_theirs():
    router = TopKRouter(D, E, K)
    statistics = track(router)[""]
    for _ in range(3):
        router(torch.randn(T, D))
    snapshot = statistics.snapshot()
    statistics.reset()
    assert snapshot.tokens_per_expert.sum() == 3 * T * K
    assert statistics.snapshot().tokens_per_expert.sum() == 0


class ReadsOfValues(TorchDispatchMode):
    """Notes each operator that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_waits_for_the_device(device):
    router = CapacityRouter(TopKRouter(D, E, K, device=device), 0.5)
    history = History(router)
    x = torch.randn(T, D, device=device)
    with ReadsOfValues() as mode:  # on "meta" a read of a value would also raise
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            router(x)
            history.record(0)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert mode.waits == []


def test_they_are_counted_inside_a_compiled_graph():
    torch.compiler.reset()
    router = TopKRouter(D, E, K)
    statistics = track(router)[""]
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, D)
    compiled(x)
    seen = statistics.snapshot()
    statistics.reset()
    router(x)
    for a, b in zip(seen, statistics.snapshot(), strict=True):
        torch.testing.assert_close(a, b)
    compiled(x)
    assert statistics.snapshot().tokens_per_expert.sum() == 2 * T * K


def test_they_survive_export():
    router = TopKRouter(D, E, K)
    track(router)
    module = torch.export.export(router, (torch.randn(T, D),)).module()
    module(torch.randn(T, D))
    (counts,) = (buffer for name, buffer in module.named_buffers() if name.endswith("tokens_per_expert"))
    assert counts.sum() == T * K


def test_they_are_no_part_of_the_state_dict():
    router = SigmoidRouter(D, E, K)
    names = set(router.state_dict())
    track(router)
    assert set(router.state_dict()) == names


def test_capacity_is_counted_once_and_after_dropping():
    model = torch.nn.ModuleDict({"a": CapacityRouter(TopKRouter(D, E, K), 0.5), "b": GShardRouter(D, E)})
    tracked = track(model)
    assert set(tracked) == {"a", "b"}
    routing = model["a"](torch.randn(T, D))
    snapshot = tracked["a"].snapshot()
    assert snapshot.dropped_share.item() == pytest.approx((routing.topk_ids >= E).double().mean().item())
    assert snapshot.dropped_share > 0


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="got Linear without a Router"):
        track(torch.nn.Linear(2, 2))


def test_history_has_a_row_for_each_recorded_step(tmp_path):
    model = torch.nn.ModuleDict({"a": TopKRouter(D, E, K), "b": GShardRouter(D, E)})
    history = History(model)
    for step in (0, 10):
        for router in model.values():
            router(torch.randn(T, D))
        history.record(step)
    assert history.steps == [0, 10]
    stacked = history.stacked("a")
    assert stacked.tokens_per_expert.shape == (2, E)
    assert stacked.tokens_per_expert.sum(1).tolist() == [T * K, T * K]
    assert stacked.entropy.shape == (2,)

    pytest.importorskip("matplotlib")
    figure = history.draw(tmp_path / "pictures" / "routers.png", title="two routers")
    assert (tmp_path / "pictures" / "routers.png").stat().st_size > 0
    load, entropy, dropped, dead = figure.axes[:4]
    (image,) = load.collections
    drawn = torch.as_tensor(image.get_array().data).reshape(E, 2)
    torch.testing.assert_close(drawn, stacked.tokens_per_expert.T.double() / (T * K / E))
    for axes, values in ((entropy, stacked.entropy), (dropped, stacked.dropped_share), (dead, stacked.dead_experts)):
        assert axes.lines[0].get_ydata().tolist() == values.tolist()


def test_an_empty_history_is_not_drawn():
    with pytest.raises(ValueError, match="nothing was recorded"):
        History(TopKRouter(D, E, K)).draw()


def test_without_matplotlib_the_message_names_the_extra():
    code = """
import sys; sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import torch
from scatter_moe.routers import History, TopKRouter
router = TopKRouter(4, 2, 1)
history = History(router); router(torch.randn(3, 4)); history.record(0)
try:
    history.draw()
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "scatter-moe[plots]" in result.stdout
