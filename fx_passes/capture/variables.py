"""Questions about Dynamo's variables: is it a tensor of open length, which expert does it stand for?"""

from typing import Any

import torch
from torch import fx
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.lists import SliceVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fx_passes.markers import Expert, expert_of


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


def is_full_slice(variable: Any) -> bool:
    variable = variable.realize()
    if not isinstance(variable, SliceVariable):
        return False
    return all(item.is_python_constant() and item.as_python_constant() is None for item in variable.items)
