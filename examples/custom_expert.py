"""An expert of one's own, built from `ParallelLinear`, in a layer of its own router and a shared expert.

    python examples/custom_expert.py [--steps 60] [--device cpu]

`ParallelLinear` is a stack of linear layers, one an expert. Between two of them the rows of all experts lie in one
tensor, so whatever treats rows alone is ordinary PyTorch: here a norm, a rectified square and a gate. The loop over
experts beside it computes the same, and the difference is printed.
"""

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import scatter_moe
from scatter_moe.routers import TopKRouter

WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K, TOKENS = 64, 128, 16, 2, 512


class SquaredExperts(nn.Module):
    """`y = down(norm(relu(up(x))^2) * sigmoid(gate(x)))` for each of a token's experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = scatter_moe.ParallelLinear(EXPERTS, WIDTH, EXPERT_WIDTH, bias=False)
        self.gate = scatter_moe.ParallelLinear(EXPERTS, WIDTH, EXPERT_WIDTH, bias=False)
        self.down = scatter_moe.ParallelLinear(EXPERTS, EXPERT_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        dispatch = scatter_moe.Dispatch.of_ids(topk_ids, EXPERTS)  # sorted once, for all three layers
        h = F.relu(self.up(x, dispatch, rows_out="grouped")).square()
        h = F.rms_norm(h, (EXPERT_WIDTH,)) * self.gate(x, dispatch, rows_out="grouped").sigmoid()
        y = self.down(h, dispatch, rows_in="grouped").unflatten(0, (-1, TOP_K))
        return (y * topk_weights[..., None]).sum(1)

    def loop(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The same, one expert after the other."""
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(topk_ids == e)
            up, gate = (F.linear(x[token], layer.weight[e]) for layer in (self.up, self.gate))
            h = F.rms_norm(F.relu(up).square(), (EXPERT_WIDTH,)) * gate.sigmoid()
            y = F.linear(h, self.down.weight[e])
            out.index_add_(0, token, y * topk_weights[token, slot, None])
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console()

    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(WIDTH, EXPERT_WIDTH), nn.SiLU(), nn.Linear(EXPERT_WIDTH, WIDTH))
    router, experts = TopKRouter(WIDTH, EXPERTS, TOP_K), SquaredExperts()
    model = scatter_moe.MoE(router, experts, shared).to(options.device)
    x = torch.randn(TOKENS, WIDTH, device=options.device)
    topk_weights, topk_ids, _ = router(x)
    both = [f(x, topk_ids, topk_weights) for f in (experts, experts.loop)]
    console.print(f"largest difference to the loop over experts: {(both[0] - both[1]).abs().max().item():.1e}")

    forward = torch.compile(model, fullgraph=True)  # one graph under any backend
    optimizer, target = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.roll(x, 1, dims=-1).sin()
    for step in track(range(options.steps), "training", console=console):
        loss = F.mse_loss(forward(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, options.steps - 1):
            console.print(f"step {step + 1:4d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
