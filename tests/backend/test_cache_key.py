"""PyTorch's compile caches: hit by the next process, and never with code that was made with other sources of ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import scatter_moe
from fx_passes import cache_key
from tests.backend.harness import fresh_dynamo, rewritten

T, D, E, K = 6, 8, 3, 2
ROOT = Path(__file__).parents[2]
PACKAGES = ("scatter_moe", "fx_passes", "registrations", "scatter_ops")
SETTINGS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

CHANGES = {
    "nothing": None,
    "a pass": ("fx_passes/rewriting/rewrite.py", '"""', '"""changed '),
    "a kernel": ("scatter_ops/kernels/grouped_gemm.py", '"""', '"""changed '),
    "a backward formula": ("registrations/mlp_forward.py", "return grad_x, grad", "return 2 * grad_x, grad"),
}
"""What is changed in which file: old and new text."""


class Experts(nn.Module):
    """A loop over given routing: nothing is left of it that Inductor would write a kernel for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(E, D, D))
        self.down = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(ids, E).permute(2, 1, 0)
        for e in range(E):
            slots, tokens = torch.where(mask[e])
            rows = nn.functional.linear(nn.functional.silu(nn.functional.linear(x[tokens], self.up[e])), self.down[e])
            out.index_add_(0, tokens, rows * weights[tokens, slots, None])
        return out


def step() -> dict:
    """One training step of the compiled experts: which caches hit and missed, and the gradient of the input."""
    fresh_dynamo()
    x = torch.linspace(-1, 1, T * D).view(T, D).requires_grad_()
    ids = torch.arange(T * K).view(T, K) % E
    compiled = torch.compile(Experts(), backend="scatter_moe", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(x, ids, torch.full((T, K), 0.5)).sum(), x)
    assert rewritten() == 1
    caches = {**counters["inductor"], **counters["aot_autograd"]}
    seen = {name: number for name, number in caches.items() if "cache_hit" in name or "cache_miss" in name}
    return {"caches": seen, "grad": grad.tolist(), "package": scatter_moe.__file__}


COLD = {"autograd_cache_miss": 1, "fxgraph_cache_miss": 2}
HIT = {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}
CHANGED = {"autograd_cache_miss": 1, "fxgraph_cache_miss": 1, "fxgraph_cache_hit": 1}
"""The graph of the backward pass is keyed by its own nodes: it calls our operators and holds nothing of them."""


EXPECTED = {"nothing": HIT, "a backward formula": COLD}


def test_caches_hit_until_sources_change(monkeypatch):
    with fresh_cache():
        assert step()["caches"] == COLD
        assert step()["caches"] == HIT
        monkeypatch.setattr(cache_key, "sources_hash", lambda: "changed")
        assert step()["caches"] == CHANGED


@pytest.mark.slow
def test_next_process_hits_until_a_source_changes(tmp_path):
    first = step_in_a_process(tmp_path, "nothing")
    assert first["caches"] == COLD
    for what in CHANGES:
        seen = step_in_a_process(tmp_path, what)
        assert seen["caches"] == EXPECTED.get(what, CHANGED), what
        factor = 2 if what == "a backward formula" else 1
        torch.testing.assert_close(torch.tensor(seen["grad"]), factor * torch.tensor(first["grad"]), rtol=0, atol=0)


def step_in_a_process(tmp_path, what: str) -> dict:
    """What `step` returns in a process of its own that uses a copy of the packages with one change."""
    copy = Path(tmp_path, what.replace(" ", "_") + str(len(list(tmp_path.iterdir()))))
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    if CHANGES[what] is not None:
        name, old, new = CHANGES[what]
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new, 1))
    environment = os.environ | SETTINGS | {"PYTHONPATH": str(copy), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code = "import json; from tests.backend.test_cache_key import step; print(json.dumps(step()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["package"].startswith(str(copy))
    return seen


@pytest.mark.parametrize("target", [torch.ops.scatter_moe.route.default, torch.ops.scatter_moe.route])
def test_tag_is_set_within_and_restored(target):
    before = torch.compiler.config.cache_key_tag
    with cache_key.caches_keyed_by_sources(graph_with(target)):
        assert cache_key.sources_hash() in torch.compiler.config.cache_key_tag
        assert torch.compiler.config.cache_key_tag.startswith(before)
    assert torch.compiler.config.cache_key_tag == before


def test_graphs_without_our_ops_keep_their_keys():
    before = torch.compiler.config.cache_key_tag
    with cache_key.caches_keyed_by_sources(graph_with(torch.relu)):
        assert torch.compiler.config.cache_key_tag == before


def graph_with(target) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(target, (graph.placeholder("x"),)))
    return fx.GraphModule({}, graph)


def test_hash_follows_every_source(tmp_path, monkeypatch):
    for package in ("fx_passes", "registrations", "scatter_ops/tuning/configs"):
        (tmp_path / package).mkdir(parents=True)
    files = [tmp_path / "registrations/mlp.py", tmp_path / "scatter_ops/tuning/configs/sm_90.json"]
    for file in files:
        file.write_text("1")
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "fx_passes/cache_key.py"))
    hashes = {cache_key.sources_hash.__wrapped__()}
    for file in files:
        file.write_text("2")
        hashes.add(cache_key.sources_hash.__wrapped__())
    assert len(hashes) == 3
