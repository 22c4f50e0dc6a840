"""What a user is told of a node, in the words of the code that it stems from."""

import re

import torch
from torch import fx

from fx_passes.graph.markers import (
    current_expert,
    each_expert,
    expert_count,
    expert_parameter,
    expert_places,
    expert_segment,
    experts_hit,
    place_among_hits,
)

_STAND_INS = {
    expert_count: "the number of an expert's tokens, as a Python number,",
    experts_hit: "the number of experts with a token",
    current_expert: "the number of the loop's expert",
    each_expert: "the number of the loop's expert",
    place_among_hits: "the place of an expert among those with a token",
    expert_segment: "what an expert takes of the sorted rows",
    expert_places: "where an expert's rows lie among the sorted ones",
    expert_parameter: "a parameter of the loop's expert",
    torch.ops.aten.sym_size.int: "a size that depends on tokens, or on how many an expert has,",
}
"""What code has no name for, nor do the names of these."""


def said_of(node: fx.Node) -> str:
    """What `node` holds. An input is called `x` or `self.experts.up`, as the code has it and not as Dynamo does."""
    stand_in = _stand_in(node)
    if stand_in is not None:
        return stand_in
    source = getattr(node, "_dynamo_source", None)
    if node.op != "placeholder" or source is None:
        return f"`{node.name}`"
    name = re.sub(r"^[LG]\['(\w+)'\]", r"\1", source.name)
    return "`" + re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", name) + "`"


def said_of_call(node: fx.Node) -> str:
    """Of a call in an expert that no rule speaks of."""
    stand_in = _stand_in(node)
    if stand_in is not None:
        return f"{stand_in} is used as a value"
    is_python = callable(node.target) and not isinstance(node.target, torch._ops.OperatorBase)
    return f"an expert calls `{getattr(node.target, '__name__', node.target) if is_python else node.target}`"


def _stand_in(node: fx.Node) -> str | None:
    """Not looked up: a target need not be hashable."""
    return next((said for target, said in _STAND_INS.items() if node.target is target), None)
