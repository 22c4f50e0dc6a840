"""What a user is told of a call in an expert that no rule speaks of."""

import torch
from torch import fx

from fx_passes.graph.markers import (
    current_expert,
    each_expert,
    expert_count,
    expert_places,
    expert_segment,
    experts_hit,
    place_among_hits,
)

_SAID = {
    current_expert: "an expert's number is used as a value",
    each_expert: "an expert's number is used as a value",
    place_among_hits: "an expert's place among those that have tokens is used as a value",
    expert_count: "how many tokens an expert has is used as a value",
    experts_hit: "how many experts have tokens is used as a value",
    expert_segment: "an expert takes a segment of what is not known to lie as its rows do",
    expert_places: "where an expert's rows lie is used as a value",
    torch.ops.aten.sym_size.int: "a size that depends on the tokens, or on how many an expert has, is used as a value",
}


def said_of_call(node: fx.Node) -> str:
    """Code has no name for what stands for an expert, for its rows and for numbers of them."""
    return _SAID.get(node.target) or f"an expert calls `{node.target}`"
