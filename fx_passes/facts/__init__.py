"""What routing tensors mean.

A naive MoE loop hides its routing in tensor algebra: one_hot, permute, sum, `> 0`, nonzero, where. `fact(node)` reads
that algebra back and answers with a statement (`fx_passes.facts.statements`), or None where it knows nothing.

Each file has the rules of one kind of operation; a rule gets a node and what is known of its first operand.
"""

from fx_passes.facts.reading import (
    chosen,
    chosen_tokens,
    counted_mask,
    counts_behind,
    fact,
    forget_erased,
    is_made_of_counts,
    is_made_of_slots,
    selected,
    summed_mask,
    without_rest,
)

__all__ = [
    "chosen",
    "chosen_tokens",
    "counted_mask",
    "counts_behind",
    "fact",
    "forget_erased",
    "is_made_of_counts",
    "is_made_of_slots",
    "selected",
    "summed_mask",
    "without_rest",
]
