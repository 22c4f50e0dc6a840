"""A model of what an exchange moves, stores and takes per layer: arithmetic, not a measurement.

    python -m benchmarks.exchange_model --shape D --nvlink-gbs 450 --network-gbs 50 --gpus-per-node 8

Assumes experts drawn evenly and independently, bandwidths that are reached in full, no latency and no overlap. A
training step has four transfers: tokens out and results back, and the gradients of both.

T tokens of a rank, K experts per token, D model width, R ranks.
"""

import argparse
from dataclasses import dataclass

from benchmarks import report
from benchmarks.shapes import SHAPES, Shape
from scatter_moe.distributed.exchange import share_of_ranks

RANKS = (2, 4, 8, 16, 32, 64)
BYTES = 2  # of a bfloat16 element
TRANSFERS = 4


@dataclass(frozen=True)
class Network:
    """Gigabytes per second that one GPU sends at best: to its node's other GPUs, and to other nodes."""

    nvlink_gbs: float
    network_gbs: float
    gpus_per_node: int


def rows_sent(top_k: int, num_ranks: int) -> dict[str, float]:
    """Rows of D elements that leave a rank for each of its tokens, in one transfer."""
    others = num_ranks - 1
    return {
        "plain": top_k * others / num_ranks,
        "all_to_all": others * share_of_ranks(num_ranks, top_k),
        "all_gather": float(others),
    }


def row(shape: Shape, num_ranks: int, network: Network) -> dict[str, float | int]:
    """One line of the table. plain: an all-to-all that sends a token once to each of its experts."""
    rows = rows_sent(shape.K, num_ranks)
    near = (min(num_ranks, network.gpus_per_node) - 1) / (num_ranks - 1)
    result: dict[str, float | int] = {"ranks": num_ranks}
    for name, count in rows.items():
        result[f"{name}_kib_per_token"] = kib_per_token(shape, count)
    for name, count in rows.items():
        gigabytes = gigabytes_per_step(shape, count)
        seconds = max(gigabytes * near / network.nvlink_gbs, gigabytes * (1 - near) / network.network_gbs)
        result[f"{name}_ms_per_step"] = 1e3 * seconds
    result["all_gather_gib"] = gathered_gib(shape, num_ranks)
    return result


def gigabytes_per_step(shape: Shape, rows: float) -> float:
    """That leave a rank in a training step."""
    return TRANSFERS * shape.T * rows * shape.D * BYTES / 1e9


def kib_per_token(shape: Shape, rows: float) -> float:
    return rows * shape.D * BYTES / 2**10


def gathered_gib(shape: Shape, num_ranks: int) -> float:
    """Memory of all ranks' tokens."""
    return num_ranks * shape.T * shape.D * BYTES / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="D")
    parser.add_argument("--nvlink-gbs", type=float, required=True)
    parser.add_argument("--network-gbs", type=float, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    arguments = parser.parse_args()
    network = Network(arguments.nvlink_gbs, arguments.network_gbs, arguments.gpus_per_node)
    rows = [row(SHAPES[arguments.shape], num_ranks, network) for num_ranks in RANKS]
    report.print_table(f"shape {arguments.shape}: model, not measured", rows)


if __name__ == "__main__":
    main()
