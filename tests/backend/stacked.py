"""Modules with experts in one buffer a name, and a look at their graphs."""

import io

import torch
from torch import nn

import scatter_moe
from tests.zoo.bodies import RangeLoop
from tests.zoo.case import Case

NAMES = ("w1", "w2", "w3")


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList((RangeLoop(), RangeLoop()))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def pair(block=RangeLoop):
    """Equal modules: one for eager, one that is stacked."""
    case = Case("stacked", block)
    return case.make(), scatter_moe.stack_experts(case.make())


def inputs_for_experts(graph):
    return [node for node in graph.graph.find_nodes(op="placeholder") if "expert" in node.name]


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
