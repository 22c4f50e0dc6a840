"""Capturing naive loops that Dynamo cannot trace on its own.

Dynamo gives up at some places of a naive loop: at `nonzero()` and its kin, at `for e in hit`, at `if mask.any()`, at
`tokens.tolist()`. While a frame is traced for our backend each such place is an *event*: tracing goes on under an
assumption, and the nodes traced under it carry its number.

    dynamic op     speculation.py   the output's length is left open
    hit loop       loops.py         one iteration stands for all, over an expert without a value; or one an expert
    empty branch   branches.py      the side that handles a token is taken; the other must go on to the next iteration
    index list     index_list.py    a list of row positions stays the tensor that it was
    leaf           leaves.py        nobody reads the gradient of fresh zeros that require one
    module.to()    modules_to.py    nothing is assumed: it is guarded that nothing changes

The expert's number as a Python integer or in a text (expert_numbers.py) makes a hit loop have one iteration an expert.

After the rewrite every event must be *dissolved*: all its nodes were replaced. Otherwise the frame is traced again with
the event denied, which is to say as Dynamo alone does it. So nothing that was assumed ever runs. What rests on no
assumption is denied where nothing was rewritten. Functions that the frame calls are frames of their own then, and left
alone in their turn where it is the frame's later writes that speak against a rewrite (callers.py).
"""

from fx_passes.capture.events import Event, Guard, events_of, guards_of, loops_of, without_events
from fx_passes.capture.speculation import Capture

__all__ = ["Capture", "Event", "Guard", "events_of", "guards_of", "loops_of", "without_events"]
