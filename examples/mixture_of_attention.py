"""A mixture of attention heads: each token chooses which heads it asks with; all share keys and values.

    python examples/mixture_of_attention.py [--steps 200] [--device cpu]

A two-layer model learns to recall: it reads pairs of a key and a value, then a key again, and must say its value. K of
E experts' heads are active for a token. Afterwards it decodes with a cache, token by token, which gives what it gives
at once.
"""

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from scatter_moe import KVCache, MixtureOfAttention
from scatter_moe.routers import TopKRouter

SYMBOLS, PAIRS, WIDTH, EXPERTS, TOP_K, HEADS, HEAD_DIM = 16, 4, 64, 8, 2, 2, 16


class Model(nn.Module):
    """Embedding, two residual layers of attention with norms, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = nn.ModuleList(
            MixtureOfAttention(TopKRouter(WIDTH, EXPERTS, TOP_K), WIDTH, EXPERTS, HEADS, HEAD_DIM, rope_theta=100.0)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        x = self.embedding(symbols)
        for i, (norm, attention) in enumerate(zip(self.norms, self.attention, strict=True)):
            x = x + attention(norm(x), cache=None if caches is None else caches[i])
        return self.head(x)


def batch(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Sequences key, value, key, value, ..., key; and the value that belongs to the last key."""
    keys = torch.rand(size, SYMBOLS, device=device).argsort(dim=1)[:, :PAIRS]
    values = torch.randint(SYMBOLS, (size, PAIRS), device=device)
    asked = torch.randint(PAIRS, (size, 1), device=device)
    pairs = torch.stack((keys, values), dim=2).flatten(1)
    return torch.cat((pairs, keys.gather(1, asked)), dim=1), values.gather(1, asked)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console()

    torch.manual_seed(0)
    model = Model().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        symbols, answer = batch(256, options.device)
        logits = model(symbols)[:, -1]
        loss = F.cross_entropy(logits, answer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == options.steps - 1:
            right = (logits.argmax(-1) == answer).float().mean().item()
            console.print(f"step {step + 1:4d}  loss {loss.item():.3f}  right {right:.0%}")

    symbols, _ = batch(4, options.device)
    with torch.no_grad():
        at_once, caches = model(symbols), [KVCache(), KVCache()]
        one_by_one = torch.cat([model(symbol, caches) for symbol in symbols.split(1, dim=1)], dim=1)
    console.print(f"decoding with a cache: largest difference {(at_once - one_by_one).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
