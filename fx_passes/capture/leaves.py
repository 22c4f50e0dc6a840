"""`torch.zeros(..., requires_grad=True)`: plain zeros, under the assumption that their gradient is nobody's.

See `fx_passes.rewriting.leaves`, which tells where that holds.
"""

from typing import Any

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.tensor import TensorVariable

from fx_passes.capture.events import tag
from fx_passes.rewriting.leaves import mark_leaf


def zeros(
    capture: Any, tx: Any, fn: VariableTracker, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """The zeros, which say of themselves that they require a gradient."""
    asked = kwargs.get("requires_grad")
    if asked is None or not asked.is_python_constant() or asked.as_python_constant() is not True:
        return None
    event = capture.event(tx, "zeros that require a gradient")
    if capture.is_denied(event):
        return None
    rest = {name: value for name, value in kwargs.items() if name != "requires_grad"}
    made = fn.call_function(tx, args, rest)
    assert isinstance(made, TensorVariable)
    node = made.as_proxy().node
    node.meta["example_value"].requires_grad_(True)
    made.requires_grad = True
    mark_leaf(node)
    tag(node, (event.number,), ())
    return made
