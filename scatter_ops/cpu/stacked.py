"""Memory for stacked gradients: zero for the experts without tokens, to be written for the others."""

import math
import mmap
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scatter_ops.grouping import Groups

MAPPED_BYTES = 2**25  # from here on the C library's malloc (glibc's) takes fresh pages for each tensor, too
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def stacked_grads(shape: Sequence[int], like: Tensor, groups: Groups) -> Tensor:
    """[E, ...] of the dtype of `like`. The experts of `groups` are left undefined, or zero.

    Fresh pages are zero, and one that nobody writes takes neither time nor memory: with few tokens most are.
    """
    num_bytes = math.prod(shape) * like.itemsize
    if num_bytes >= MAPPED_BYTES and len(groups.experts) < groups.num_experts:
        return torch.frombuffer(mmap.mmap(-1, num_bytes, **PRIVATE), dtype=like.dtype).view(shape)
    stacked = like.new_empty(shape)
    for before, after in pairwise((-1, *groups.experts, groups.num_experts)):
        if after > before + 1:
            stacked[before + 1 : after].zero_()
    return stacked
