"""The module whose forward a program is: parameters in every form, buffers, and Python state."""

import torch
from torch import nn
from torch.nn import functional as F

E, K, D, FF = 3, 2, 4, 5


def counting():
    """A generator that stands at the same place after each number."""
    number = 0
    while number < 100:
        yield number
        number += 1


def nested(depth):
    """A list in a list in a list ..."""
    return [] if depth == 0 else [nested(depth - 1)]


def innermost(lists):
    while lists and lists[0] != 1:
        lists = lists[0]
    return lists


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(D, FF)
        self.down = nn.Linear(FF, D, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        shapes = {"up": (D, FF), "gate_up": (D, 2 * FF), "down": (FF, D), "square": (D, D), "column": (D, 1)}
        shapes |= {"up_bias": (FF,), "down_bias": (D,), "scale": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(E, *shape)))
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.register_buffer("served", torch.zeros(E))
        self.register_buffer("total", torch.ones(D))
        self.count = 0
        self.kept = None
