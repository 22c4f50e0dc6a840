"""Research code that stays naive on purpose, and is compiled as it is.

    python examples/research_loop.py [--steps 40] [--device cpu]

Each expert here is something no library has: a norm of its own, a gate that is squared, a low-rank correction. The
layer is the loop that one would write on a whiteboard. Change `Expert.forward`, run again: as long as rows are treated
alone it stays one graph of grouped GEMMs; otherwise the report says which line is in the way.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import scatter_moe

WIDTH, EXPERT_WIDTH, RANK, EXPERTS, TOP_K, TOKENS = 64, 128, 4, 16, 2, 512


class Expert(nn.Module):
    """Today's idea."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, EXPERT_WIDTH)
        self.up = nn.Linear(WIDTH, EXPERT_WIDTH)
        self.down = nn.Linear(EXPERT_WIDTH, WIDTH)
        self.low, self.high = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        gate = torch.sigmoid(self.gate(x))
        return self.down(gate * gate * self.up(x)) + self.high(torch.tanh(self.low(x)))


class Layer(nn.Module):
    """A residual Mixture of Experts, as one would write it on a whiteboard."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return x + out


def train(name: str, make: Callable[[nn.Module], Callable], steps: int, device: str) -> tuple[list[float], list[float]]:
    """Losses and milliseconds of each step, from the same weights and data each time."""
    torch.manual_seed(0)
    model = Layer().to(device)
    forward, optimizer = make(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(TOKENS, WIDTH, device=device)
    target = torch.roll(x, 1, dims=-1).sin()
    losses, times = [], []
    for _ in track(range(steps), name):
        start = time.perf_counter()
        loss = F.mse_loss(forward(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - start))
    return losses, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    scatter_moe.explain(Layer().to(options.device), torch.randn(8, WIDTH, device=options.device))
    torch.compiler.reset()
    ways = {"eager": lambda model: model, "scatter_moe": lambda model: torch.compile(model, backend="scatter_moe")}
    runs = {name: train(name, make, options.steps, options.device) for name, make in ways.items()}

    table = Table("", "first step, ms", "median step, ms", "first loss", "last loss", title="Training")
    for name, (losses, times) in runs.items():
        median = sorted(times[1:] or times)[len(times[1:]) // 2]
        table.add_row(name, f"{times[0]:.0f}", f"{median:.1f}", f"{losses[0]:.5f}", f"{losses[-1]:.5f}")
    console = Console()
    console.print(table)
    (eager, _), (ours, _) = runs.values()
    console.print(f"largest difference of the loss: {max(abs(a - b) for a, b in zip(eager, ours, strict=True)):.1e}")


if __name__ == "__main__":
    main()
