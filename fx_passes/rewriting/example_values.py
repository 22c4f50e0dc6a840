"""Example values of new nodes on which a method is called.

Dynamo notes with each tensor of its graph what it looks like, and AOTAutograd's cache takes a graph with a method call
only if that is known of the method's owner.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fx_passes.graph.autocast import dtype_at


def add_where_methods_are_called(made: Iterable[fx.Node], place: fx.Node, like: torch.Tensor, cast: bool) -> None:
    """Runs those of `made`, and what they need, on the examples of their inputs.

    They stand at `place`, where autocast casts them if it is on and `cast` is true. `like` is an example of the graph.
    """
    owners = [node for node in made if any(_calls_method_of(user, node) for user in node.users)]
    if not owners:
        return
    assert isinstance(like, FakeTensor)
    with like.fake_mode, torch.no_grad(), _autocast_at(place, like.device.type, cast):
        for node in owners:
            _example_value(node)


def _autocast_at(place: fx.Node, device_type: str, cast: bool) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # the meta device
        return nullcontext()
    dtype = dtype_at(place, device_type) if cast else None
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


def _calls_method_of(user: fx.Node, node: fx.Node) -> bool:
    return user.op == "call_method" and user.args[0] is node


def _example_value(node: fx.Node) -> Any:
    if "example_value" not in node.meta:
        args, kwargs = fx.map_arg((node.args, node.kwargs), _example_value)
        function: Any = node.target
        if node.op == "call_method":
            function = getattr(type(args[0]), function)
        node.meta["example_value"] = function(*args, **kwargs)
    return node.meta["example_value"]
