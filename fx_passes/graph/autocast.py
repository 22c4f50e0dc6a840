"""What autocast does at a place in the graph.

It leaves `grouped_mm` alone and casts what our operators read: products of fp32 experts stay fp32 only where our
operators run with autocast switched off. That is done where the rest of the body is nothing that autocast reaches.
"""

import torch
from torch import fx
from torch.amp import autocast_mode

from fx_passes.body.values import Body, Op
from fx_passes.graph.ops import fake_tensor, is_inplace, op_name
from fx_passes.rules.row_wise import ALONG_DIM, POINTWISE, RESHAPES

_NEVER_CAST = POINTWISE | ALONG_DIM | RESHAPES | {"getitem"}
"""Operations that autocast lets run in the dtype of rows that are fp32."""


def dtype_at(node: fx.Node, device_type: str) -> torch.dtype | None:
    """What autocast casts to where `node` stands; None where it is off, or where the device has none."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    ambient = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    entered: dict[fx.Node, torch.dtype | None] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is autocast_mode._enter_autocast and other.args[0] == device_type:
            _, dtype, enabled, _ = other.args
            entered[other] = (dtype or torch.get_autocast_dtype(device_type)) if enabled else None
        elif other.target is autocast_mode._exit_autocast:
            entered.pop(other.args[0], None)
    return list(entered.values())[-1] if entered else ambient


def product_left_alone(body: Body) -> fx.Node | None:
    """A product of the body which autocast would cast if it were one of ours."""
    for op in body.of(Op):
        product = op.node.args[0] if is_inplace(op.node) else op.node
        tensor = fake_tensor(product)
        if op_name(product) != "grouped_mm" or tensor is None:
            continue
        if dtype_at(product, tensor.device.type) not in (None, tensor.dtype):
            return product
    return None


def reaches_products_alone(body: Body) -> bool:
    """Whether switching autocast off changes nothing in an fp32 body but our own products."""
    for op in body.of(Op):
        tensor = fake_tensor(op.node)
        is_product = op.name == "linear" and tensor is not None and tensor.dtype == torch.float32
        if not is_product and (op.name not in _NEVER_CAST or (tensor is not None and tensor.dtype != torch.float32)):
            return False
    return True


def switched_off(graph: fx.Graph, device_type: str) -> fx.Node:
    """From here on autocast is off, until `switched_back`."""
    return graph.call_function(autocast_mode._enter_autocast, (device_type, None, False, None))


def switched_back(graph: fx.Graph, entered: fx.Node) -> None:
    graph.call_function(autocast_mode._exit_autocast, (entered,))
