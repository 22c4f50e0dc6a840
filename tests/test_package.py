"""The package as a user gets it: what the wheel holds, what an import does, what works without Triton."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["fx_passes", "registrations", "scatter_moe", "scatter_ops"]
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # the import then raises ImportError


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout's packages."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "benchmarks", "docs", "examples", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def run_python(code: str, folder: Path) -> str:
    """The output of a fresh interpreter that has the checkout on its path but isn't in it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_wheel_holds_the_four_packages_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert sorted(top) == PACKAGES


def test_wheel_holds_every_source_file(wheel):
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".json"} or path.name == "py.typed"
    }
    assert sources == {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_names_the_backend_the_command_and_the_license(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = archive.read(metadata).decode()
    assert "[torch_dynamo_backends]\nscatter_moe = scatter_moe:backend" in entry_points
    assert "[console_scripts]\nscatter-moe = scatter_moe.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + [need for extra in project["optional-dependencies"].values() for need in extra]
    names = {need.split(";")[0].split("[")[0].split(">")[0].strip() for need in needs} - {"scatter-moe"}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert names <= {pin.split("==")[0] for pin in pins}


def test_import_registers_operators_and_backend_once(tmp_path):
    code = """
import importlib.metadata as metadata
find = metadata.entry_points

def where_nothing_is_installed(**select):
    return find(group="none") if select.get("group") == "torch_dynamo_backends" else find(**select)

metadata.entry_points = where_nothing_is_installed
import torch, scatter_moe
assert torch._dynamo.lookup_backend("scatter_moe") is scatter_moe.backend
assert torch._dynamo.list_backends().count("scatter_moe") == 1
print(torch.ops.scatter_moe.mlp.default._schema.name)
"""
    assert run_python(code, tmp_path) == "scatter_moe::mlp"


def test_entry_point_loads_the_backend_without_an_import(tmp_path, wheel):
    code = f"""
import sys
sys.path[:] = [{str(wheel)!r}, *(p for p in sys.path if p != {str(ROOT)!r})]  # a wheel is importable, metadata and all
import torch
assert "scatter_moe" in torch._dynamo.list_backends()
torch.compile(torch.nn.Linear(2, 2), backend="scatter_moe", options={{"inner_backend": "eager"}})(torch.zeros(1, 2))
print(sys.modules["scatter_moe"].__file__)
"""
    assert ".whl/scatter_moe/__init__.py" in run_python(code, tmp_path).replace(os.sep, "/")


def test_everything_imports_without_triton(tmp_path):
    code = f"""
import importlib, pkgutil
for package in {PACKAGES}:
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.startswith(("scatter_ops.cuda", "scatter_ops.kernels")):  # what is written in Triton
            importlib.import_module(info.name)
print("imported")
"""
    assert run_python(WITHOUT_TRITON + code, tmp_path) == "imported"


def test_cpu_path_works_without_triton(tmp_path):
    code = """
import torch, scatter_moe
from torch._dynamo.utils import counters

class MoE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 4)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8)) for _ in range(4)
        )

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out

torch.manual_seed(0)
model, x = MoE(), torch.randn(10, 8)
compiled = torch.compile(model, backend="scatter_moe", options={"inner_backend": "aot_eager"})
torch.testing.assert_close(compiled(x), model(x))
compiled(x).sum().backward()
print(counters["scatter_moe"]["rewritten"])
"""
    assert run_python(WITHOUT_TRITON + code, tmp_path) == "1"


def test_operators_work_where_torch_has_no_distributed(tmp_path):
    code = """
import sys, torch
torch.distributed.is_available = lambda: False
sys.modules["torch.distributed.tensor"] = None
import registrations
order, _ = torch.ops.scatter_moe.route(torch.tensor([[1, 0]]), 2)
print(order.tolist())
"""
    assert run_python(code, tmp_path) == "[1, 0]"
