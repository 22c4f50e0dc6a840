"""A hook that is added to an expert after compile must be noticed.

Dynamo doesn't guard on empty hook dicts of modules, as a rule. A naive loop notices a new hook all the same, since it
runs in eager; so the modules of a rewritten region are guarded.
"""

import functools
import re
from collections import OrderedDict
from collections.abc import Iterable

from torch import fx
from torch._dynamo.guards import GuardBuilder, GuardManagerType
from torch._dynamo.source import AttrSource
from torch._guards import Guard, Source, TracingContext

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_on_hooks(guard: Guard) -> bool:
    """Whether it is one of Dynamo's on an empty dict of a module's hooks, which check nothing as a rule."""
    return guard.inner_create_fn() is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT and guard.name.endswith(HOOKS)


def without_hooks(guards: Iterable[Guard]) -> list[Guard]:
    """Guards that do check what these are on, one a module."""
    names: dict[Source, list[str]] = {}
    for guard in guards:
        source = guard.originating_source
        assert isinstance(source, AttrSource)
        names.setdefault(source.base, []).append(source.member)
    return [Guard(module, functools.partial(_are_empty, tuple(own))) for module, own in names.items()]


def _are_empty(names: tuple[str, ...], builder: GuardBuilder, guard: Guard) -> None:
    attributes = builder.get_guard_manager(guard).get_generic_dict_manager(
        source=f"{guard.name}.__dict__", example_value={}, guard_manager_enum=GuardManagerType.GUARD_MANAGER
    )
    for name in names:
        hooks = attributes.dict_getitem_manager(
            key=name,
            source=f"{guard.name}.{name}",
            example_value=OrderedDict(),
            guard_manager_enum=GuardManagerType.GUARD_MANAGER,
        )
        hooks.add_dict_length_check_guard(0, [f"not {guard.name}.{name}"], guard.user_stack)


def guard_hooks_of(regions: Iterable[tuple[fx.Node, Iterable[fx.Node]]]) -> None:
    """The frame is traced again once a module of these regions, or one below it, has a hook.

    regions: the anchor of each, and its nodes.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    modules = {path for anchor, nodes in regions for path in _modules_of(anchor, nodes)}
    guards = context.guards_context.dynamo_guards
    own = [guard for guard in guards if guard.name.endswith(HOOKS) and _is_below(guard.name, modules)]
    for guard in without_hooks(filter(is_on_hooks, own)):
        guards.add(guard)
    for guard in own:
        if not is_on_hooks(guard):
            guards.add(guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH))


def _is_below(source: str, modules: set[tuple[str, ...]]) -> bool:
    path = _words(source)
    return any(path[:length] in modules for length in range(len(path)))


def _modules_of(anchor: fx.Node, nodes: Iterable[fx.Node]) -> set[tuple[str, ...]]:
    """The module whose forward holds the loop, and those that it calls there: experts may be held by another.

    The first is empty where that is the frame itself.
    """
    *around, own = _modules_around(anchor) or [""]
    called = {module for node in nodes for module in _modules_around(node)}
    return set(map(_words, {own} | called.difference(around)))


def _modules_around(node: fx.Node) -> list[str]:
    """The modules in whose forward `node` was traced, the innermost last."""
    return [str(source) for source, _ in node.meta.get("nn_module_stack", {}).values()]


def _words(source: str) -> tuple[str, ...]:
    """`L['self']._modules['experts']._forward_hooks` as ("L", "self", "experts", "_forward_hooks")."""
    return tuple(word for word in re.findall(r"\w+", source) if word not in ("_modules", "modules"))
