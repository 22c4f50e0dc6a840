"""Capturing naive loops that Dynamo cannot trace on its own.

Dynamo gives up at some places of a naive loop: at `nonzero()` and its kin, at `for e in hit`, at `if mask.any()`, at `tokens.tolist()`. While a
frame is traced for our backend each such place is an *event*: tracing goes on under an assumption, and the nodes traced under it carry its number.

    dynamic op     the output's length is left open                                                             speculation.py
    hit loop       one iteration stands for all, over an expert without a value; or one iteration an expert     loops.py
    empty branch   the side that handles a token is taken; the other must go straight to the next iteration     branches.py
    index list     a list of row positions stays the tensor that it was                                         indexing.py

After the rewrite every event must be *dissolved*: all its nodes were replaced. Otherwise the frame is traced again with the event denied, which
is to say as Dynamo alone does it. So nothing that was assumed ever runs.
"""

from fx_passes.capture.events import Event, events_of, guards_of
from fx_passes.capture.speculation import Capture

__all__ = ["Capture", "Event", "events_of", "guards_of"]
