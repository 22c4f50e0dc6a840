"""The naive forms. A form is one file with `NAME`, `candidates` and `match`; `FORMS` is tried in order on each graph.

`candidates(graph)` yields the places where the form may stand. `match(candidate)` returns the MoERegion there. Both
raise Rejected where what they see is almost the form.
"""

from fx_passes.forms import (
    assignment,
    dense_experts,
    dense_modules,
    fixed_capacity,
    flat_pairs,
    gathered_weights,
    hit_loop,
    range_loop,
    segments,
    slot_loop,
    sorted_segments,
    sorted_slots,
    summed_outputs,
)

FORMS = (
    summed_outputs,
    hit_loop,
    range_loop,
    slot_loop,
    assignment,
    flat_pairs,
    sorted_slots,
    sorted_segments,
    segments,
    gathered_weights,
    dense_experts,
    dense_modules,
    fixed_capacity,
)
