"""Questions about Dynamo's variables: is it a tensor of open length, which expert does it stand for?"""

from typing import Any

import torch
from torch import fx
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import ListVariable, SliceVariable, TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import constrain_range, free_unbacked_symbols

from fx_passes.graph.markers import Expert, expert_of
from fx_passes.graph.ops import arg, example, op_name


def expert_of_variable(variable: Any) -> Expert | None:
    """The expert that a loop variable, or what was computed from it, stands for."""
    if not isinstance(variable, (TensorVariable, SymNodeVariable)) or not isinstance(variable.proxy, fx.Proxy):
        return None
    return expert_of(variable.as_proxy().node)


def rank_of(variable: TensorVariable | SymNodeVariable) -> int:
    """Dims of a tensor; none of a number."""
    value = variable.as_proxy().node.meta["example_value"]
    return value.dim() if isinstance(value, torch.Tensor) else 0


def has_open_length(variable: TensorVariable) -> bool:
    """Whether the first size of a tensor depends on data."""
    value = variable.as_proxy().node.meta["example_value"]
    return value.dim() > 0 and is_open(value.shape[0])


def is_open(number: Any) -> bool:
    """Whether a symbolic number depends on data."""
    return isinstance(number, (torch.SymInt, torch.SymBool)) and bool(free_unbacked_symbols(number))


def call_in_graph(tx: Any, target: Any, *args: Any) -> VariableTracker:
    """The result of a new node that calls `target`."""
    return wrap_fx_proxy(tx, tx.output.create_proxy("call_function", target, args, {}))


def open_number(capture: Any, tx: Any, count: int, target: Any, *args: Any) -> VariableTracker:
    """A number without a value from 0 to `count` - 1: the result of a new node that calls `target`."""
    shape_env = capture.output.shape_env
    with shape_env.ignore_fresh_unbacked_symbols():
        value = shape_env.create_unbacked_symint()
    constrain_range(value, min=0, max=count - 1)
    capture.forget_new_symbols()
    return SymNodeVariable.create(tx, capture.output.create_proxy("call_function", target, args, {}), value)


def read_attribute(tx: Any, variable: VariableTracker, name: str) -> VariableTracker:
    """`variable.name`, guarded as Dynamo guards it; what its variables call this differs between versions."""
    return VariableTracker.build(tx, getattr).call_function(tx, [variable, ConstantVariable.create(name)], {})


def unbound(variable: Any) -> tuple[fx.Proxy, int] | None:
    """(tensor, dim) where `variable` is the tuple `tensor.unbind(dim)`."""
    items = variable.items if isinstance(variable, (TupleVariable, ListVariable)) else []
    nodes = [item.as_proxy().node for item in items if isinstance(item, TensorVariable)]
    whole = nodes[0].args[0] if nodes and op_name(nodes[0]) == "getitem" else None
    if len(nodes) != len(items) or not isinstance(whole, fx.Node) or op_name(whole) != "unbind":
        return None
    is_whole = [node.args for node in nodes] == [(whole, place) for place in range(len(example(whole)))]
    source = fx.Proxy(arg(whole, 0, "input"), items[0].proxy.tracer)
    return (source, arg(whole, 1, "dim", 0)) if is_whole else None


def is_full_slice(variable: Any) -> bool:
    variable = variable.realize()
    if not isinstance(variable, SliceVariable):
        return False
    return all(item.is_python_constant() and item.as_python_constant() is None for item in variable.items)
