"""Operands of grouped GEMMs as kernels take them: rows, weights, routing, and the tiles that fit them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scatter_ops import tuning
from scatter_ops.cuda.device import capability, dot_precision, num_multiprocessors
from scatter_ops.cuda.parameters import ALIGNMENT, ExpertWeight
from scatter_ops.cuda.routing import Schedule, schedule


@dataclass(frozen=True)
class Rows:
    """Left operand: [rows, columns]; divisor 0 reads row i of the grouped rows, d > 0 row order[i] // d."""

    data: Tensor
    divisor: int

    def __post_init__(self) -> None:
        if self.data.stride(-1) != 1:
            object.__setattr__(self, "data", self.data.contiguous())


class Routing:
    """order and offsets with the schedules made from them: at most one per row tile size."""

    def __init__(self, order_N: Tensor, offsets_E: Tensor) -> None:
        self.order_N, self.offsets_E = order_N, offsets_E
        self.num_slots, self.num_experts = order_N.numel(), offsets_E.numel()
        self._schedules: dict[int, Schedule] = {}

    def schedule(self, block_m: int, with_inverse: bool = False) -> Schedule:
        known = self._schedules.get(block_m)
        if known is None or (with_inverse and known.inverse_N is None):
            known = self._schedules[block_m] = schedule(self.order_N, self.offsets_E, block_m, with_inverse)
        return known

    @property
    def inverse_N(self) -> Tensor:
        for known in self._schedules.values():
            if known.inverse_N is not None:
                return known.inverse_N
        inverse = self.schedule(128, with_inverse=True).inverse_N
        assert inverse is not None
        return inverse


def select_config(op: str, x: Tensor, routing: Routing, n: int, k: int, k_major: bool = False) -> tuning.Config:
    shape = tuning.shape_class(routing.num_slots, routing.num_experts, n, k)
    return tuning.select(op, capability(x.device), shape, x.dtype, dot_precision(x.dtype), k_major)


def grid_size(config: tuning.Config, num_tiles: int, device: torch.device, spared: int = 0) -> tuple[int]:
    """Programs to launch, persistent ones on all multiprocessors but those `spared`."""
    if config.programs_per_sm == 0:
        return (num_tiles,)
    return (min(num_tiles, config.programs_per_sm * (num_multiprocessors(device) - spared)),)


def uses_tma(config: tuning.Config, device: torch.device) -> bool:
    """Triton's interpreter knows descriptors too."""
    return config.tma and (device.type == "cpu" or capability(device) >= (9, 0))


def product_options(
    rows: Rows, weight: ExpertWeight, config: tuning.Config, block_n: int, n_ways: int
) -> tuple[Any, Any, dict[str, Any]]:
    """(x, weight, options): the operands and what kernels that call multiply_tile take as constants about them."""
    use_tma = uses_tma(config, rows.data.device)
    block_k = config.block_k
    descriptor = weight_descriptor(weight, block_n, block_k, n_ways) if use_tma else None
    x_tma = (
        use_tma and rows.divisor == 0 and tma_can_read(rows.data) and (weight.ways == n_ways or weight.k % block_k == 0)
    )
    x = TensorDescriptor.from_tensor(rows.data, [config.block_m, block_k]) if x_tma else rows.data
    options = {
        "distances_ptr": weight.addresses.distances if descriptor and weight.addresses else None,
        "WEIGHT": "tma" if descriptor else "list" if weight.is_list else "strided",
        "X_TMA": x_tma,
        "N_MAJOR": weight.stride_k != 1 and weight.stride_n == 1,
        "EVEN_K": weight.k % block_k == 0,
        "PRECISION": dot_precision(rows.data.dtype),
        "UNIT": _unit_of_product(rows.data, weight),
        "BLOCK_M": config.block_m,
        "BLOCK_K": block_k,
        "GROUP_M": config.group_m,
        # A base pointer carried from tile to tile isn't known to be aligned, and loads aren't asynchronous then. Rows
        # that are gathered wait for their slots, which a flattened loop can't load a tile ahead.
        "FLATTEN": config.flatten and descriptor is not None and x_tma,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return x, descriptor or weight.data, options


def _unit_of_product(x: Tensor, weight: ExpertWeight) -> int:
    if min(weight.stride_n, weight.stride_k) != 1:
        return 1
    of_rows = max(weight.stride_n, weight.stride_k)
    return unit(x, x.stride(0), weight.k, weight.n, of_rows, weight.stride_way, weight.stride_e)


def unit(x: Tensor, *numbers: int) -> int:
    """Elements of 16 bytes, which are loaded at once, if they divide all numbers and Triton can't know: 16 don't."""
    elements = ALIGNMENT // x.element_size()
    known = all(number % 16 == 0 for number in numbers)
    return elements if not known and all(number % elements == 0 for number in numbers) else 1


def weight_descriptor(weight: ExpertWeight, block_n: int, block_k: int, n_ways: int) -> TensorDescriptor | None:
    """[E, ways, n, k], or [E, k, ways, n] where n is contiguous; None where the strides or the address forbid TMA.

    Of a list, E counts spacings of addresses, and a way in a tensor of its own is an expert of its own.
    """
    data, num_experts, stride_e, ways = weight.data, weight.num_experts, weight.stride_e, weight.ways
    if weight.addresses is not None:
        assert weight.lowest is not None
        data, num_experts = weight.lowest, weight.addresses.extent
        stride_e = weight.addresses.spacing // data.element_size()
        if weight.experts_per_way:
            ways = 1
        if ways < n_ways or num_experts >= 2**31:
            return None
    stride_way = weight.stride_way if ways > 1 else stride_e
    if weight.stride_k == 1:
        shape = [num_experts, ways, weight.n, weight.k]
        strides = [stride_e, stride_way, weight.stride_n, 1]
        block = [1, n_ways, block_n // n_ways, block_k]
    else:
        shape = [num_experts, weight.k, ways, weight.n]
        strides = [stride_e, weight.stride_k, stride_way, weight.stride_n]
        block = [1, block_k, n_ways, block_n // n_ways]
    size = data.element_size()
    aligned = all(stride > 0 and stride * size % ALIGNMENT == 0 for stride in strides[:-1])
    if strides[-1] != 1 or not aligned or data.data_ptr() % ALIGNMENT:
        return None
    return TensorDescriptor(data, shape, strides, block)


def tma_can_read(x: Tensor) -> bool:
    """Whether a descriptor of [rows, columns] can be made: TMA wants addresses and strides aligned to 16 bytes."""
    return x.numel() > 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
