"""The functional collectives of torch.distributed that the exchanges are made of: differentiable and traceable.

Each starts one collective for every given tensor before it waits for the first. Backward of an all-to-all is the
all-to-all back, of all-gather reduce-scatter, of reduce-scatter all-gather: gradients are sums over the ranks' losses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_FUNCTIONAL = torch.ops._c10d_functional


def all_to_all(tensors: Sequence[Tensor], sent: list[int], received: list[int], group: ProcessGroup) -> list[Tensor]:
    """Rows of each tensor, `sent[r]` of them to rank r in turn; returns the rows of all ranks, `received[r]` each."""
    name = group.group_name
    started = [_FUNCTIONAL.all_to_all_single(tensor.contiguous(), received, sent, name) for tensor in tensors]
    return [_FUNCTIONAL.wait_tensor(tensor) for tensor in started]


def all_gather(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The rows of all ranks, in the ranks' order. Each rank gives equally many."""
    name, size = group.group_name, group.size()
    started = [_FUNCTIONAL.all_gather_into_tensor(tensor.contiguous(), size, name) for tensor in tensors]
    return [_FUNCTIONAL.wait_tensor(tensor) for tensor in started]


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, of which each rank gets its share of the rows."""
    started = _FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return _FUNCTIONAL.wait_tensor(started)
