"""Per-expert parameters as kernels see them: one strided stack, or an array of base pointers.

Equally spaced tensors of equal strides (the unbound views of one stack, or experts allocated together) are read as
one strided tensor. Anything else goes through an int64 array of pointers on the device, made once for each tuple of
pointers. E experts; a weight is [E, ways, n, k] with n its columns in the output and k the reduction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from scatter_ops.cuda.recording import decided_by_addresses

ALIGNMENT = 16  # bytes: kernels load 16 at a time through pointers of a list
MAX_CACHED_ARRAYS = 4096

MAX_SPACING = 512  # bytes between allocations of PyTorch's allocator


class Addresses(NamedTuple):
    """Where each tensor of a list starts: its address, and its distance from the lowest one in units of `spacing`.

    One TMA descriptor reads the whole list: its base is the lowest tensor (number `lowest`), and its outermost
    dimension counts spacings (bytes).
    """

    pointers: Tensor
    distances: Tensor
    lowest: int
    spacing: int
    extent: int


_arrays: dict[tuple[torch.device, tuple[int, ...]], Addresses] = {}
_captured: dict[tuple[torch.device, tuple[int, ...]], Addresses] = {}


@dataclass(frozen=True)
class ExpertWeight:
    """A weight [E, ways, n, k]; data is a tensor at its start, or base pointers ([ways * E] or [E]) if is_list.

    addresses and lowest (the tensor at the lowest address): of a list, None of a stack.
    """

    data: Tensor
    is_list: bool
    num_experts: int
    ways: int
    n: int
    k: int
    stride_e: int
    stride_way: int
    stride_n: int
    stride_k: int
    experts_per_way: int = 0
    addresses: Addresses | None = None
    lowest: Tensor | None = None

    def transposed(self) -> "ExpertWeight":
        """The weight of the product's backward: n and k exchanged."""
        return replace(self, n=self.k, k=self.n, stride_n=self.stride_k, stride_k=self.stride_n)

    def in_two_ways(self) -> "ExpertWeight":
        """A concatenated gate_up [E, 2 F, k] seen as [E, 2, F, k]."""
        return replace(self, ways=2, n=self.n // 2, stride_way=self.n // 2 * self.stride_n)

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """In the order kernels take them."""
        return self.stride_e, self.stride_way, self.stride_n, self.stride_k, self.experts_per_way


@dataclass(frozen=True)
class ExpertBias:
    data: Tensor | None
    stride_e: int
    kind: str  # none, strided or list


def expert_weight(tensors: Sequence[Tensor], transposed: bool) -> ExpertWeight:
    """One tensor [E, n, k] or E tensors [n, k]; [E, k, n] and [k, n] if transposed."""
    data, addresses, num_experts, stride_e = _placed(tensors, expert_dim=2)
    is_list = addresses is not None
    n_dim, k_dim = (-1, -2) if transposed else (-2, -1)
    # A stack made because nothing else fits has its own strides; a list has those of its tensors.
    like = tensors[0] if is_list else data
    sizes = like.shape[n_dim], like.shape[k_dim]
    lowest = tensors[addresses.lowest] if is_list else None
    strides = stride_e, 0, like.stride(n_dim), like.stride(k_dim)
    return ExpertWeight(data, is_list, num_experts, 1, *sizes, *strides, 0, addresses, lowest)


def separate_weight(gate: Sequence[Tensor], up: Sequence[Tensor], transposed: bool) -> ExpertWeight:
    """Gate and up in tensors of their own, as one weight of two ways."""
    decided_by_addresses()
    if _spacing(gate, expert_dim=2) is not None and _spacing(up, expert_dim=2) is not None:
        first, second = (expert_weight(tensors, transposed) for tensors in (gate, up))
        distance = second.data.data_ptr() - first.data.data_ptr()
        # TMA knows no negative strides.
        if first.strides == second.strides and distance > 0 and distance % ALIGNMENT == 0:
            return replace(first, ways=2, stride_way=distance // first.data.element_size())
    both = expert_weight([*_unstacked(gate), *_unstacked(up)], transposed)
    num_experts = both.num_experts // 2
    if both.is_list:
        return replace(both, num_experts=num_experts, ways=2, experts_per_way=num_experts)
    return replace(both, num_experts=num_experts, ways=2, stride_way=num_experts * both.stride_e)


def expert_bias(tensors: Sequence[Tensor]) -> ExpertBias:
    """No tensor, one [E, n] or E tensors [n]."""
    if not tensors:
        return ExpertBias(None, 0, "none")
    if any(bias.stride(-1) != 1 for bias in tensors):
        tensors = [tensors[0].contiguous() if tensors[0].dim() == 2 else torch.stack(tuple(tensors))]
    data, addresses, _, stride_e = _placed(tensors, expert_dim=1)
    return ExpertBias(data, stride_e, "list" if addresses else "strided")


def _placed(tensors: Sequence[Tensor], expert_dim: int) -> tuple[Tensor, Addresses | None, int, int]:
    """(data, addresses if it is a list, number of experts, distance between experts in elements)."""
    first, spacing = tensors[0], _spacing(tensors, expert_dim)
    if spacing is not None:
        return first, None, first.shape[0] if first.dim() > expert_dim else len(tensors), spacing
    same_strides = len({tensor.stride() for tensor in tensors}) == 1
    addresses = _addresses(tensors) if same_strides else None
    if addresses is not None:
        return addresses.pointers, addresses, len(tensors), 0
    stack = torch.stack(tuple(tensors))
    return stack, None, len(tensors), stack.stride(0)


def _spacing(tensors: Sequence[Tensor], expert_dim: int) -> int | None:
    """Elements from one expert to the next of a stack, or of tensors that lie as if they were one; None of others."""
    first = tensors[0]
    if first.dim() > expert_dim:
        return first.stride(0)
    decided_by_addresses()
    strides, start = first.stride(), first.data_ptr()
    step = tensors[1].data_ptr() - start if len(tensors) > 1 else 0
    for i, tensor in enumerate(tensors):
        if tensor.data_ptr() != start + i * step or tensor.stride() != strides:
            return None
    return step // first.element_size() if step % ALIGNMENT == 0 else None


def _unstacked(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors[0].unbind(0) if tensors[0].dim() == 3 else tensors


def _addresses(tensors: Sequence[Tensor]) -> Addresses | None:
    """The pointers on the device, None unless all are aligned.

    Arrays that a CUDA graph was captured with are kept as long as the process lives.
    """
    like, pointers = tensors[0], [tensor.data_ptr() for tensor in tensors]
    key = like.device, tuple(pointers)
    array = _captured.get(key)
    if array is not None:
        return array
    array = _arrays.get(key)
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    if array is None:
        if any(pointer % ALIGNMENT for pointer in pointers):
            return None
        if capturing:
            raise RuntimeError(
                "per-expert weights met first in a CUDA graph capture: run the model once before capturing it"
            )
        if len(_arrays) >= MAX_CACHED_ARRAYS:
            _drop_arrays(like)
        lowest = min(pointers)
        spacing = math.gcd(MAX_SPACING, *(pointer - lowest for pointer in pointers))
        distances = [(pointer - lowest) // spacing for pointer in pointers]
        # As int32 kernels read nonsense where tensors lie 2^31 spacings apart; `extent` tells launchers.
        both = torch.tensor([pointers, distances], dtype=torch.int64, device=like.device)
        array = _arrays[key] = Addresses(both[0], both[1], pointers.index(lowest), spacing, max(distances) + 1)
    elif capturing:
        _captured[key] = array
    return array


def _drop_arrays(like: Tensor) -> None:
    """Kernels on any stream may still read the arrays, so wait for them before their memory is used again."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    _arrays.clear()
