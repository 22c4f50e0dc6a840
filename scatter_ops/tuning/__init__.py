"""Which tile sizes a kernel runs with: shipped JSON rows per device family, a heuristic where no row fits.

A row of configs/sm_XY.json (plain JSON, the first that matches wins; absent keys match everything; ranges are
inclusive):

    {"op": "glu_forward", "dtypes": ["bfloat16"], "rows": [128, 4096], "n": [0, 8192], "k": [0, 8192],
     "config": {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 3}}

`rows` is the average number of rows per expert rounded up to a power of two: a new number of tokens seldom means
another config, so nothing is tuned or compiled anew. Rows of float32 may also ask for a `precision` of products (tf32
or ieee) and for `k_major` (true or false): Hopper's tensor cores want the reduction of float32 contiguous in memory.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONFIGS = Path(__file__).parent / "configs"
SHARED_MEMORY_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
LEAST_SHARED_MEMORY_KIB = 99
RESERVED_BYTES = 2048  # barriers and scratch of reductions beside the operands' buffers


class ShapeClass(NamedTuple):
    """rows: average rows per expert, rounded up to a power of two; n, k: columns and reduction of the product.

    For weight_grad n and k are the sizes of one expert's gradient and rows is its reduction.
    """

    rows: int
    n: int
    k: int


@dataclass(frozen=True)
class Config:
    """Tile of the product, block_m x block_n, block_k deep; group_m row tiles share a column tile in the cache.

    programs_per_sm = 0 launches one program a tile, else the programs are persistent. flatten pipelines across tiles.
    tma reads by tensor descriptors where device and strides allow it, and writes by them too if tma_out. regroup
    copies gathered rows into grouped order first, for Hopper's kernels too, which gather well. epilogue_parts takes the
    epilogue of glu_backward in that many parts of the tile. overlap takes Hopper's kernel where there is one: an
    epilogue's loads and stores beside the products.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 0
    flatten: bool = False
    tma: bool = False
    tma_out: bool = True
    regroup: bool = False
    epilogue_parts: int = 1
    overlap: bool = False


HOPPER = Config(128, 256, 64, num_warps=8, num_stages=3, programs_per_sm=1, tma=True)


def shape_class(num_rows: int, num_experts: int, n: int, k: int) -> ShapeClass:
    average = -(-num_rows // num_experts)
    return ShapeClass(1 << max(0, average - 1).bit_length(), n, k)


@functools.lru_cache(maxsize=4096)
def select(
    op: str,
    capability: tuple[int, int],
    shape: ShapeClass,
    dtype: torch.dtype,
    precision: str = "tf32",
    k_major: bool = False,
) -> Config:
    """Config of `op` (grouped_gemm, glu_forward, glu_backward, weight_grad).

    precision is that of float32 products; k_major: the reduction is contiguous in both operands.
    """
    for row in _rows(capability):
        if _matches(row, op, shape, dtype, precision, k_major):
            return fit(op, Config(**row["config"]), shape, capability, dtype)
    return fit(op, _heuristic(op, capability, shape, dtype, precision), shape, capability, dtype)


def shared_memory_bytes(op: str, config: Config, dtype: torch.dtype) -> int:
    """Buffers of the pipelined operands, and of the tiles on their way out by TMA: an upper estimate."""
    operands = config.num_stages * (config.block_m + config.block_n) * config.block_k
    outputs = config.block_m * config.block_n if config.tma and config.tma_out else 0
    if op == "glu_backward":
        outputs = 2 * outputs // config.epilogue_parts
    return (operands + outputs) * dtype.itemsize + RESERVED_BYTES


def fit(op: str, config: Config, shape: ShapeClass, capability: tuple[int, int], dtype: torch.dtype) -> Config:
    """No tile much larger than the matrix, and no more stages than shared memory holds."""
    config = replace(
        config,
        block_n=min(config.block_n, max(32, _next_power_of_2(shape.n))),
        block_k=min(config.block_k, max(16, _next_power_of_2(shape.k))),
    )
    config = replace(config, epilogue_parts=max(1, min(config.epilogue_parts, config.block_n // 16)))
    limit = shared_memory_limit(capability)
    while shared_memory_bytes(op, config, dtype) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.tma_out:
            config = replace(config, tma_out=False)
        elif config.num_stages > 1:
            config = replace(config, num_stages=1)
        else:
            break
    return config


def shared_memory_limit(capability: tuple[int, int]) -> int:
    """Bytes that a block may use."""
    return 1024 * SHARED_MEMORY_KIB.get(capability, LEAST_SHARED_MEMORY_KIB)


def _heuristic(op: str, capability: tuple[int, int], shape: ShapeClass, dtype: torch.dtype, precision: str) -> Config:
    # Twice the average: an expert with more rows than a tile has would have its weights read twice.
    block_m = 128 if op == "weight_grad" else min(128, max(16, 2 * shape.rows))
    if dtype == torch.float32:
        wide = precision == "tf32" and block_m == 128
        parts = 2 if op == "glu_backward" else 1
        return Config(min(block_m, 64), 128 if wide else 64, 32 if wide else 16, num_warps=4, epilogue_parts=parts)
    if op == "weight_grad" and shape.rows <= 64:
        return Config(128, 128, max(16, min(32, shape.rows)), num_warps=8)
    if block_m < 128:  # as many bytes of weights in flight as there is room for: they are what such a product costs
        return Config(block_m, 128, 128, num_warps=4, num_stages=3, epilogue_parts=2 if op == "glu_backward" else 1)
    if shared_memory_limit(capability) < shared_memory_bytes(op, HOPPER, dtype) or capability < (9, 0):
        return Config(128, 128, 32, num_warps=8, num_stages=4, epilogue_parts=2)
    regroup = op in ("weight_grad", "glu_backward")
    return replace(HOPPER, regroup=regroup, epilogue_parts=8 if op == "glu_backward" else 1)


@functools.cache
def _rows(capability: tuple[int, int]) -> list[dict[str, Any]]:
    path = config_file(capability)
    return json.loads(path.read_text()) if path.exists() else []


def config_file(capability: tuple[int, int]) -> Path:
    """Where the rows of a device family are; without that file the heuristic decides alone."""
    return CONFIGS / f"sm_{capability[0]}{capability[1]}.json"


def _matches(
    row: dict[str, Any], op: str, shape: ShapeClass, dtype: torch.dtype, precision: str, k_major: bool
) -> bool:
    if row["op"] != op or str(dtype).removeprefix("torch.") not in row["dtypes"]:
        return False
    if row.get("precision", precision) != precision or row.get("k_major", k_major) != k_major:
        return False
    ranges = {name: row.get(name, [0, float("inf")]) for name in shape._fields}
    return all(ranges[name][0] <= value <= ranges[name][1] for name, value in shape._asdict().items())


def _next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
