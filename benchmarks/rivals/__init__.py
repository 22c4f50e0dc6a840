"""Other implementations of one expert MLP (SwiGLU, stacked weights), each with the signature of `Implementation`.

    y = forward(x, topk_weights, topk_ids, gate_up, down)       differentiable in all but topk_ids

`available` yields those that can run here and says in one line why another can't.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rivals import packages, plain
from registrations.library import OPS

Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """gate_up: our stack [E, 2 F, D], gate before up, or its gradient, as this one has it."""

    forward: Implementation
    gate_up: Callable[[Tensor], Tensor] = lambda gate_up: gate_up


def scatter_moe(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order, offsets = OPS.route(topk_ids, down.shape[0])
    return OPS.mlp(x, topk_weights, order, offsets, [gate_up], [], [down], [], [], [], "silu", "concatenated")


OURS = Rival(scatter_moe)


def interleaved(gate_up: Tensor) -> Tensor:
    """Rows of gate and up in turns."""
    num_experts, rows, columns = gate_up.shape
    return gate_up.view(num_experts, 2, rows // 2, columns).transpose(1, 2).reshape(num_experts, rows, columns)


RIVALS: dict[str, Callable[[], Rival]] = {
    "grouped_mm": lambda: Rival(plain.grouped_mm()),
    "grouped_mm, compiled": lambda: Rival(torch.compile(plain.grouped_mm())),
    "transformers": lambda: Rival(plain.transformers()),
    "transformers, compiled": lambda: Rival(torch.compile(plain.transformers())),
    "scattermoe": lambda: Rival(packages.scattermoe()),
    "sonicmoe": lambda: Rival(packages.sonicmoe(), interleaved),
    "megablocks": lambda: Rival(packages.megablocks()),
    "moe_ops": lambda: Rival(packages.moe_ops()),
    "triton_kernels": lambda: Rival(packages.triton_kernels(), interleaved),
}


def add_rivals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rivals", nargs="*", choices=RIVALS, help="time these rivals too, or all that are installed if none is named"
    )


def available(names: Sequence[str] | None) -> Iterator[tuple[str, Rival]]:
    """Name and implementation of each rival of `names` that can run here; of all for (), of none for None."""
    if names is None:
        return
    for name in names or RIVALS:
        try:
            yield name, RIVALS[name]()
        except ImportError as error:
            print(f"skipped: {name} ({error})")
