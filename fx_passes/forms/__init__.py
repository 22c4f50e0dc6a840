"""The naive forms. A form is one file with `NAME` and `match`; `FORMS` is tried in order on each accumulator.

`match(accumulator, accumulations)` returns a MoERegion, returns None where the form is another one, or raises Rejected.
"""

from fx_passes.forms import hit_loop, range_loop

FORMS = (hit_loop, range_loop)
