"""Tensors that hold the number of each row of another: 0, 1, 2, ..."""

from typing import Any

import torch

from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import fake_tensor, op_name, same_size, varargs


def numbers_rows(node: Any, count: int | torch.SymInt) -> bool:
    """Whether `node` is arange(count), and stays that."""
    tensor = fake_tensor(node)
    if tensor is None or op_name(node) != "arange" or len(varargs(node, 0, "end")) != 1:
        return False
    if set(node.kwargs) - {"end", "device", "dtype"} or any(writers_of(node)):
        return False
    return tensor.dtype in (torch.int32, torch.int64) and same_size(tensor.shape[0], count)
