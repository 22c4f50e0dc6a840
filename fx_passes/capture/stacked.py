"""Experts whose tensors lie in one buffer a name (`fx_passes.modules.expert_stacks`), in a graph.

Each buffer is one input, which a call right before the graph makes. One guard on the list stands for those on all
experts but the first.
"""

from typing import Any

import torch
from torch import fx
from torch._dynamo.bytecode_transformation import create_call_function
from torch._dynamo.guards import GuardBuilder, GuardManagerType
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import ChainedSource, Guard, Source, dataclass_with_cached_hash

from fx_passes.modules.expert_stacks import ExpertStack, stack_of, stacked
from fx_passes.modules.likeness import Path


@dataclass_with_cached_hash(frozen=True)
class BufferSource(ChainedSource):
    """What `stacked(experts, path, recorded)` returns; `base` is where the experts come from."""

    path: Path
    recorded: bool

    @property
    def _name_template(self) -> str:
        return f"stacked({{0}}, {self.path}, {self.recorded})"

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from(stacked.__module__, stacked.__name__))
        codegen(self.base)
        codegen.append_output(codegen.create_load_const(self.path))
        codegen.append_output(codegen.create_load_const(self.recorded))
        codegen.extend_output(create_call_function(3, False))


def read_buffer(tx: Any, experts: Source, stack: ExpertStack, path: Path) -> fx.Node:
    """The input of the graph that is the buffer at `path`, recorded for backward where the code that reads it is.

    The guard on the list replaces Dynamo's on the tensor.
    """
    source = BufferSource(experts, path, torch.is_grad_enabled())
    known = tx.output.input_source_to_var.get(source)
    if known is not None:
        return known.as_proxy().node
    example = stack.example(path)
    node = VariableBuilder(tx, source)(example).as_proxy().node
    node.meta["grapharg"].example_strong_ref = example
    guards = tx.output.guards
    for guard in [guard for guard in guards if guard.originating_source == source]:
        guards.inner.discard(guard)
    return node


def guard_stack(output: Any, experts: Source, stack: ExpertStack) -> None:
    """The list must be one that is stacked, and of this kind.

    Dynamo may skip guards on a module whose dicts it finds unchanged, but not what a function reads from it.
    """
    kind = stack.kind

    def experts_are_stacked(builder: GuardBuilder, guard: Guard) -> None:
        read = builder.get_guard_manager(guard).lambda_manager(
            python_lambda=_kind_of,
            source=f"stack of {guard.name}",
            example_value=kind,
            guard_manager_enum=GuardManagerType.GUARD_MANAGER,
        )
        read.add_equals_match_guard(kind, [f"the experts in {guard.name} are stacked"], guard.user_stack)

    output.guards.add(Guard(experts, experts_are_stacked), collect_debug_stack=False)


def _kind_of(container: Any) -> Any:
    stack = stack_of(container)
    return stack.kind if stack is not None else None
