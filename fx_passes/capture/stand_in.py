"""One module that stands for all experts of a ModuleList while their loop is traced as one iteration.

    for e in range(E):
        ... self.experts[e](x[tokens]) ...

If the experts are equal in all but the values of their parameters, and nothing asks which of them it has (see
`fx_passes.capture.opaque`), then tracing one is tracing all. The stand-in is a copy of the first expert: a module of
its own whose parameters are tensors of their own, so that what is read from it can't be taken for what is read from an
expert by its number. After the loop each parameter of the stand-in becomes `expert_parameter([that of expert 0, that
of expert 1, ...], e)`; at the end each guard on the stand-in becomes one guard on every expert.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource, DictGetItemSource, UnspecializedNNModuleSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._guards import ChainedSource, Guard, Source, dataclass_with_cached_hash

from fx_passes.capture.stacked import guard_stack, read_buffer
from fx_passes.entry.hook_guards import is_on_hooks, without_hooks
from fx_passes.graph.markers import expert_parameter
from fx_passes.modules.expert_stacks import ExpertStack, stack_of
from fx_passes.modules.likeness import Path, are_alike, containers_in, copy_without_identity, tensor_at

_numbers = itertools.count()


@dataclass_with_cached_hash(frozen=True)
class StandInSource(ChainedSource):
    """Where a stand-in comes from: no place that code could load it from. `base` is the first expert's."""

    number: int

    @property
    def _name_template(self) -> str:
        return f"stand_in_{self.number}"

    def reconstruct(self, codegen: Any) -> None:
        raise NotImplementedError("a stand-in for experts is not part of the program")


class StandIn(NamedTuple):
    """`paths` leads from a tensor of the stand-in, by id, to its place in an expert.

    `container` is where the ModuleList comes from, `sources` are where its experts do: where they are stacked only the
    first one, whose guards then serve for all.
    """

    source: StandInSource
    module: nn.Module
    experts: tuple[nn.Module, ...]
    sources: tuple[Source, ...]
    paths: dict[int, Path]
    container: Source
    stack: ExpertStack | None


def stand_in_for(tx: Any, container: Any) -> tuple[StandIn, VariableTracker] | None:
    """A stand-in for the modules in a ModuleList, and Dynamo's variable for it; None where they are not alike.

    None under torch.export, too, which looks up the name of each parameter that was met: a stand-in's have none.
    """
    if not is_module_list(container) or tx.output.current_tracer is not tx.output.root_tracer or tx.output.export:
        return None
    stack = stack_of(container.value) if container.source is not None else None
    found = (stack.experts, _first_of(container)) if stack else _experts_in(tx, container)
    if found is None:
        return None
    experts, sources = found
    if not (stack or are_alike(experts)) or _has_pending_writes(tx.output.side_effects, experts):
        return None
    module, paths = copy_without_identity(experts[0])
    source = StandInSource(sources[0], next(_numbers))
    variable = VariableBuilder(tx, source)(module)
    return StandIn(source, module, experts, sources, paths, container.source, stack), variable


def is_module_list(container: Any) -> bool:
    """Whether `container` is a ModuleList that is indexed and iterated as nn.ModuleList is, in the same order."""
    if not isinstance(container, UnspecializedNNModuleVariable) or not isinstance(container.value, nn.ModuleList):
        return False
    names = ("__getitem__", "__iter__", "__len__", "__getattr__", "__getattribute__")
    is_as_usual = all(getattr(type(container.value), name) is getattr(nn.ModuleList, name) for name in names)
    return is_as_usual and list(container.value._modules) == [str(place) for place in range(len(container.value))]


def length_of(container: Any) -> int:
    return len(container.value)


def _first_of(container: Any) -> tuple[Source]:
    """Where the first expert comes from. Dynamo's own variables of all of them would guard each one's name."""
    return (DictGetItemSource(AttrSource(container.source, "_modules"), "0"),)


def _experts_in(tx: Any, container: Any) -> tuple[tuple[nn.Module, ...], tuple[Source, ...]] | None:
    """The experts and where they come from; None where that isn't known of all."""
    items = VariableTracker.build(tx, list).call_function(tx, [container], {}).items
    experts = tuple(module for module in map(_module_of, items) if module is not None)
    sources = tuple(source for source in map(_source_of, items) if source is not None)
    return (experts, sources) if 2 <= len(items) == len(experts) == len(sources) else None


def _module_of(item: VariableTracker) -> nn.Module | None:
    if isinstance(item, LazyVariableTracker) and not item.is_realized():
        value = item.peek_value()
    else:
        value = getattr(item.realize(), "value", None)
    return value if isinstance(value, nn.Module) else None


def _source_of(item: VariableTracker) -> Source | None:
    """Before Dynamo notes in it that this is a module, which the builder of a variable does."""
    source = item.source
    return source.base if isinstance(source, UnspecializedNNModuleSource) else source


def _has_pending_writes(side_effects: Any, experts: tuple[nn.Module, ...]) -> bool:
    """Whether the trace wrote to an expert, or to a container in it, which the module itself doesn't show yet."""
    known = side_effects.id_to_variable.items()
    written = {
        number for number, variable in known if variable.source is not None and side_effects.is_modified(variable)
    }
    modules = [module for expert in experts for module in expert.modules()] if written else []
    return any(id(part) in written for part in (*modules, *containers_in(modules)))


def replace_parameters(tx: Any, stand_in: StandIn, expert: fx.Node) -> bool:
    """After the loop: what was read from the stand-in's tensors is read from those of `expert`, which has no value.

    False where the trace got something else than a tensor of the experts.
    """
    graph = tx.output.root_tracer.graph
    for node in graph.find_nodes(op="placeholder"):
        if stand_in.source not in roots_of(node.meta["grapharg"].source):
            continue
        path = stand_in.paths.get(id(node.meta["grapharg"].example))
        if path is None:
            return False
        parameters = _parameters(tx, stand_in, node, path)
        if parameters is None:
            return False
        with graph.inserting_after(expert):
            chosen = graph.call_function(expert_parameter, (parameters, expert))
        chosen.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(chosen)
    return True


def _parameters(tx: Any, stand_in: StandIn, node: fx.Node, path: Path) -> fx.Node | list[fx.Node] | None:
    """The inputs of the graph for the tensor at `path` of each expert, or the one for all where they are stacked."""
    if stand_in.stack is not None:
        return read_buffer(tx, stand_in.container, stand_in.stack, path)
    inputs = []
    for expert, source in zip(stand_in.experts, stand_in.sources, strict=True):
        own = _moved(node.meta["grapharg"].source, {stand_in.source: source})
        inputs.append(VariableBuilder(tx, own)(tensor_at(expert, path)).as_proxy().node)
    return inputs if all(parameter.op == "placeholder" for parameter in inputs) else None


def is_left_in(graph: fx.Graph, stand_in: StandIn) -> bool:
    """Whether something that isn't erased still reads a tensor of the stand-in."""
    sources = (node.meta["grapharg"].source for node in graph.find_nodes(op="placeholder") if "grapharg" in node.meta)
    return any(stand_in.source in roots_of(source) for source in sources)


def guard_every_expert(output: Any, stand_ins: list[StandIn]) -> None:
    """At the end of the trace: each guard on a stand-in becomes one on each expert."""
    guards, ordered = output.guards, output.guard_on_key_order
    on_stand_ins = [guard for guard in guards if _roots_of_guard(guard)]
    ordered_dicts = [source for source in ordered if roots_of(source)]
    ordered.difference_update(ordered_dicts)
    for guard in on_stand_ins:
        guards.inner.discard(guard)
    on_hooks = [guard for guard in on_stand_ins if is_on_hooks(guard)]
    needed = [guard for guard in on_stand_ins if _checks_an_expert(guard)] + without_hooks(on_hooks)
    for stand_in in stand_ins:
        if stand_in.stack is not None:
            guard_stack(output, stand_in.container, stand_in.stack)
    for number in range(max((len(stand_in.sources) for stand_in in stand_ins), default=0)):
        own = {stand_in.source: stand_in.sources[number] for stand_in in stand_ins if number < len(stand_in.sources)}
        moved: dict[Source, Source] = {**own}
        ordered.update(_moved(source, moved) for source in ordered_dicts if roots_of(source) <= own.keys())
        for guard in needed:
            if _roots_of_guard(guard) <= own.keys():
                source, create_fn = _moved(guard.originating_source, moved), _moved_arguments(guard.create_fn, moved)
                guards.add(Guard(source, create_fn, user_stack=guard.user_stack), collect_debug_stack=False)


def _checks_an_expert(guard: Guard) -> bool:
    """Whether `guard` on a stand-in must hold for each expert.

    The inputs that took the place of its tensors have guards of their own. For hooks see `fx_passes.entry.hook_guards`.
    """
    return guard.inner_create_fn() not in (GuardBuilder.TENSOR_MATCH, GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT)


def _moved_arguments(create_fn: Callable[..., Any], moved: dict[Source, Source]) -> Callable[..., Any]:
    """A guard may compare with a second source."""
    if not isinstance(create_fn, functools.partial) or not _roots_of_arguments(create_fn):
        return create_fn
    args = [_moved(item, moved) if isinstance(item, Source) else item for item in create_fn.args]
    kwargs = {
        name: _moved(item, moved) if isinstance(item, Source) else item for name, item in create_fn.keywords.items()
    }
    return functools.partial(create_fn.func, *args, **kwargs)


def _roots_of_guard(guard: Guard) -> frozenset[StandInSource]:
    return roots_of(guard.originating_source) | _roots_of_arguments(guard.create_fn)


def _roots_of_arguments(create_fn: Callable[..., Any]) -> frozenset[StandInSource]:
    if not isinstance(create_fn, functools.partial):
        return frozenset()
    values = (*create_fn.args, *create_fn.keywords.values())
    return frozenset().union(*(roots_of(value) for value in values if isinstance(value, Source)))


@functools.lru_cache(maxsize=1 << 16)
def roots_of(source: Source | None) -> frozenset[StandInSource]:
    """The stand-ins that `source` leads through."""
    if source is None:
        return frozenset()
    own = frozenset((source,)) if isinstance(source, StandInSource) else frozenset()
    return own.union(*(roots_of(getattr(source, name)) for name in _sources_in(source)))


def _moved(source: Source, moved: dict[Source, Source]) -> Source:
    """`source` with each stand-in replaced as `moved` says, which also keeps what was found."""
    if not roots_of(source):
        return source
    if source not in moved:
        changed = {name: _moved(getattr(source, name), moved) for name in _sources_in(source)}
        moved[source] = dataclasses.replace(source, **changed)
    return moved[source]


@functools.lru_cache(maxsize=1 << 16)
def _sources_in(source: Source) -> tuple[str, ...]:
    fields = (field.name for field in dataclasses.fields(source))
    return tuple(name for name in fields if isinstance(getattr(source, name), Source))
