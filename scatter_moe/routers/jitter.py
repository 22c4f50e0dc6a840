"""Multiplicative noise on a router's input."""

import torch
from torch import Tensor


def jitter(x: Tensor, epsilon: float) -> Tensor:
    """x times independent noise, uniform within 1 - epsilon and 1 + epsilon.

    Switch Transformer (arXiv 2101.03961). Same shape and dtype as x; the gradient passes
    through the noise.
    """
    return x * torch.empty_like(x).uniform_(1 - epsilon, 1 + epsilon)
