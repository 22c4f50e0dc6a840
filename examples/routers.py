"""Six ways to route on one task: what each does to the balance of its experts, drawn over training.

    python examples/routers.py [--steps 150] [--device cpu]

A layer of 8 experts learns to imitate 12 linear maps, each for its own cluster of inputs; some clusters are far more
frequent than others, so a router without a balance term leaves experts idle. A table compares the end of training;
runs/routers-*.png show all of it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from scatter_moe import ExpertMLP, MoE
from scatter_moe.routers import (
    CapacityRouter,
    GShardRouter,
    History,
    NoisyTopKRouter,
    Routing,
    SigmoidRouter,
    SwitchRouter,
    TopKRouter,
    cv_squared,
    importance_loss,
    load_balancing_loss,
    tokens_per_expert,
)

WIDTH, EXPERTS, TOKENS = 32, 8, 1024
BALANCE = 0.01

ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "top2 alone": lambda: TopKRouter(WIDTH, EXPERTS, 2),
    "top2": lambda: TopKRouter(WIDTH, EXPERTS, 2),
    "switch": lambda: CapacityRouter(SwitchRouter(WIDTH, EXPERTS, jitter=0.01), 1.25),
    "gshard": lambda: CapacityRouter(GShardRouter(WIDTH, EXPERTS), 1.25),
    "noisy": lambda: NoisyTopKRouter(WIDTH, EXPERTS, 2),
    "deepseek_v3": lambda: SigmoidRouter(WIDTH, EXPERTS, 2, num_groups=4, topk_groups=2),
}


class Clusters:
    """Endless batches: x [T, D] around one of 12 centres, y the centre's own linear map of x."""

    def __init__(self, device: str, count: int = 12) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.centres = self.randn(count, WIDTH)
        self.maps = self.randn(count, WIDTH, WIDTH) / WIDTH**0.5
        self.frequency = 1 / torch.arange(1, count + 1, device=device)

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.generator.device)

    def batch(self) -> tuple[Tensor, Tensor]:
        cluster = torch.multinomial(self.frequency, TOKENS, replacement=True, generator=self.generator)
        x = self.centres[cluster] + 0.5 * self.randn(TOKENS, WIDTH)
        return x, torch.einsum("td,tdo->to", x, self.maps[cluster])


def balance_loss(name: str, router: nn.Module, x: Tensor, routing: Routing) -> Tensor | float:
    """What each paper adds to the loss."""
    if name in ("top2 alone", "deepseek_v3"):
        return 0.0
    if isinstance(router, NoisyTopKRouter):
        return importance_loss(routing) + cv_squared(router.expected_load(x, routing))
    first_choices = routing.topk_ids[:, :1] if name == "gshard" else routing.topk_ids
    return load_balancing_loss(routing.logits, first_choices)


def train(name: str, router: nn.Module, steps: int, device: str) -> tuple[History, float]:
    """The statistics of all steps, and the mean error of the last ten."""
    moe = MoE(router, ExpertMLP(EXPERTS, WIDTH, 2 * WIDTH)).to(device)
    history, data = History(moe), Clusters(device)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3)
    errors = []
    for step in track(range(steps), f"{name:12}"):
        x, y = data.batch()
        out, routing = moe.forward_with_routing(x)
        error = F.mse_loss(out, y)
        (error + BALANCE * balance_loss(name, router, x, routing)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(router, SigmoidRouter):
            router.update_correction_bias(tokens_per_expert(routing.topk_ids, EXPERTS), rate=0.01)
        history.record(step)
        errors.append(error.detach())
    return history, torch.stack(errors[-10:]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    table = Table("router", "error", "busiest expert", "idlest expert", "entropy", "dropped", title="The last step")
    for name, make in ROUTERS.items():
        torch.manual_seed(0)
        history, error = train(name, make(), arguments.steps, arguments.device)
        last = history.stacked("router")
        load = last.tokens_per_expert[-1] / last.tokens_per_expert[-1].double().mean()
        numbers = (error, load.max(), load.min(), last.entropy[-1], last.dropped_share[-1])
        table.add_row(name, *(f"{float(number):.3f}" for number in numbers))
        history.draw(Path("runs") / f"routers-{name.replace(' ', '-')}.png", title=name)
    console = Console()
    console.print(table)
    console.print("Load of 1 is even. Pictures: runs/routers-*.png")


if __name__ == "__main__":
    main()
