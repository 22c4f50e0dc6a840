"""Compiled code that calls the operators is for derivatives in reverse mode: they have no rule for forward mode.

Dynamo guards on the level of forward mode only where the code that it traces enters one.
"""

from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import GlobalStateSource
from torch._guards import TracingContext


def guard_forward_mode() -> None:
    """The frame is traced again where it is called under `torch.autograd.forward_ad.dual_level()`."""
    context = TracingContext.try_get()
    if context is not None:
        context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))
