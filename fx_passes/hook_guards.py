"""A hook that is added to an expert after compile must be noticed.

Dynamo doesn't guard on empty hook dicts of modules, as a rule. A naive loop notices a new hook all the same, since it
runs in eager; so the modules of a rewritten region are guarded.
"""

import re
from collections.abc import Iterable

from torch import fx
from torch._dynamo.guards import GuardBuilder
from torch._guards import TracingContext

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def guard_hooks_of(anchors: Iterable[fx.Node]) -> None:
    """The frame is traced again once a module of these regions, or one below it, has a hook."""
    context = TracingContext.try_get()
    if context is None:
        return
    regions = {_module_of(anchor) for anchor in anchors}
    guards = context.guards_context.dynamo_guards
    for guard in list(guards):
        if guard.name.endswith(HOOKS) and any(_words(guard.name)[: len(path)] == path for path in regions):
            guards.add(guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH))


def _module_of(anchor: fx.Node) -> tuple[str, ...]:
    """The module whose forward holds the loop; empty where that is the frame itself."""
    stack = anchor.meta.get("nn_module_stack")
    return _words(str(list(stack.values())[-1][0])) if stack else ()


def _words(source: str) -> tuple[str, ...]:
    """`L['self']._modules['experts']._forward_hooks` as ("L", "self", "experts", "_forward_hooks")."""
    return tuple(word for word in re.findall(r"\w+", source) if word not in ("_modules", "modules"))
