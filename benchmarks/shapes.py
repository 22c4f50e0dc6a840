"""Shapes of mixture-of-experts layers that benchmarks and tuning use, and their inputs.

T tokens, D model width, F expert width, E experts, K experts per token, N = T * K slots.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def rows_per_expert(self) -> int:
        return -(-self.T * self.K // self.E)

    @property
    def forward_flops(self) -> int:
        """Of a gated expert: gate, up and down."""
        return 2 * self.T * self.K * self.D * 3 * self.F


SHAPES = {
    "A": Shape(61440, 4096, 2048, 32, 4),
    "B": Shape(8192, 4096, 14336, 8, 2),
    "C": Shape(32768, 2048, 1024, 64, 8),
    "D": Shape(32768, 2048, 768, 128, 8),
    "E1": Shape(16384, 4096, 1024, 128, 8),
    "decode": Shape(64, 2048, 768, 128, 8),
    "decode256": Shape(256, 2048, 768, 128, 8),
    "E2": Shape(16384, 4096, 512, 128, 8),
    "qwen3": Shape(16384, 2048, 768, 128, 8),
    "mixtral": Shape(16384, 4096, 14336, 8, 2),
    "odd": Shape(32765, 2056, 776, 127, 7),
}
"""qwen3 and mixtral are the layers of the models of `benchmarks/models.py`; odd's sizes are no multiples of a tile."""


def shape_names(
    parser: argparse.ArgumentParser, given: Sequence[str], default: Sequence[str] = ("B", "C", "D")
) -> list[str]:
    """The shapes named on a command line. (argparse checks the choices of nargs="*" against its default as a whole.)"""
    for name in given:
        if name not in SHAPES:
            parser.error(f"shape {name}: accepted are {', '.join(SHAPES)}")
    return list(given or default)


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors: unit-scale activations, weights scaled so that every intermediate is of unit scale too."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_up: Tensor
    down: Tensor
    grad_out: Tensor


def inputs(shape: Shape, dtype: torch.dtype, device: str, zipf: float = 0.0) -> Inputs:
    """Random inputs; experts are drawn with probabilities rank^-zipf (0: uniform), distinct within a token.

    Ranks are random: an expert's number says nothing about its popularity.
    """
    T, D, F, E, K = shape
    popularity = (1.0 + torch.randperm(E, device=device)).pow(-zipf).log()
    gumbel = -torch.log(-torch.log(torch.rand(T, E, device=device)))
    scores, topk_ids = (popularity + gumbel).topk(K, dim=-1)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype) * scale

    return Inputs(
        normal(T, D),
        scores.softmax(-1),
        topk_ids,
        normal(E, 2 * F, D, scale=D**-0.5),
        normal(E, D, F, scale=F**-0.5),
        normal(T, D),
    )


def placeholders(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Tensors on the CPU of the same sizes, whose values nobody reads."""
    T, D, F, E, K = shape

    def empty(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype)

    weights, ids = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
    return Inputs(empty(T, D), weights, ids, empty(E, 2 * F, D), empty(E, D, F), empty(T, D))
