"""`scatter-moe info`: what is installed and what would run."""

import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from scatter_ops import tuning

PACKAGES = ("scatter-moe", "torch", "triton", "transformers")
OLDEST_GPU = (8, 0)  # Ampere

_HAS_EXPERTS = re.compile(r"^class \w*Experts\w*\(", re.MULTILINE)
_INTERFACE = "@use_experts_implementation"


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as plain data."""
    return {"versions": versions(), "devices": devices(), "transformers": transformers_experts()}


def versions() -> dict[str, str | None]:
    """Of Python and of each package; None for one that isn't installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def devices() -> list[dict[str, Any]]:
    """Each GPU and the CPU: what the operators run on it, and with which tuning file."""
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    cpu = {"device": "cpu", "name": platform.machine(), "memory_gib": None, "runs": "PyTorch", "tuning": None}
    return [*gpus, cpu]


def transformers_experts() -> dict[str, Any] | None:
    """What transformers would run for models with experts; None without transformers.

    `interface`: architectures whose experts take an `experts_implementation`; `own_path`: those whose experts always
    run transformers' own code, which the backend alone can rewrite; `fp8_implementations`: what experts in FP8 take,
    from a registry of their own in which "scatter_moe" is an error that says what to do.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers
    from transformers.integrations import finegrained_fp8, moe

    sources = {
        path.parent.name: path.read_text(encoding="utf-8")
        for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    }
    fp8 = getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    return {
        "implementations": sorted(moe.ALL_EXPERTS_FUNCTIONS.valid_keys()),
        "fp8_implementations": sorted(set(fp8.valid_keys()) - {"scatter_moe"}) if fp8 is not None else [],
        "interface": [name for name, source in sources.items() if _INTERFACE in source],
        "own_path": [
            name for name, source in sources.items() if _HAS_EXPERTS.search(source) and _INTERFACE not in source
        ],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    triton = importlib.util.find_spec("triton") is not None and capability >= OLDEST_GPU
    file = tuning.config_file(capability)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "runs": "Triton kernels" if triton else "no kernels: needs Triton and an Ampere GPU or newer",
        "tuning": file.name if file.exists() else "heuristic",
    }
