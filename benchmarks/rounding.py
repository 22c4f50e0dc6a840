"""What rounding makes of one layer of experts under autocast: python -m benchmarks.rounding [--seeds 16].

Qwen3-MoE's experts with fp32 weights under bf16 autocast, as with Trainer's bf16=True, in three ways. Of the output and
of each gradient: `error` is the distance to the same layer in float64, `to eager` that to transformers' loop, both
relative and in the root mean square. What the steps of a fine-tune make of such differences is in
`benchmarks/fine_tune.py`.
"""

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import scatter_moe  # noqa: F401  (registers the experts implementation)
from benchmarks import report

T, D, F, E, K = 256, 64, 32, 8, 2
WAYS = ("eager", "grouped_mm", "scatter_moe")


def run(way: str, seed: int, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """Output and gradients, in float64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E}
    settings: dict[str, Any] = {**sizes, "experts_implementation": way}
    config = Qwen3MoeConfig(**settings)
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts.to(dtype)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    weights, ids = torch.randn(T, E).softmax(-1).topk(K)
    weights = weights.bfloat16().to(torch.bfloat16 if autocast else dtype).requires_grad_()  # as the router rounds them
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = experts(x, ids, weights)
    y.backward(torch.randn(T, D).to(y))
    tensors = {"output": y, "of x": x.grad, "of the router's weights": weights.grad}
    tensors |= {"of gate_up_proj": experts.gate_up_proj.grad, "of down_proj": experts.down_proj.grad}
    return {name: tensor.detach().double() for name, tensor in tensors.items() if tensor is not None}


def measure(seeds: int) -> list[dict[str, Any]]:
    """One row a tensor and way, averaged over seeds."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        exact = run("eager", seed, torch.float64, autocast=False)
        given = {way: run(way, seed, torch.float32, autocast=True) for way in WAYS}
        for way, tensors in given.items():
            for name, tensor in tensors.items():
                size = exact[name].norm()
                distances = ((tensor - other[name]).norm() / size for other in (exact, given["eager"]))
                error, to_eager = (distance.item() for distance in distances)
                found.setdefault((name, way), []).append((error, to_eager))
    rows = []
    for (name, way), pairs in found.items():
        error, to_eager = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        rows.append({"tensor": name, "way": way, "error": error, "to eager": to_eager})
    return sorted(rows, key=lambda row: row["tensor"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    options = parser.parse_args()
    rows = measure(options.seeds)
    report.append("rounding", rows, **vars(options))
    report.print_table("one layer of experts in bf16", rows)


if __name__ == "__main__":
    main()
