"""Time candidate configs of each GEMM phase of a layer and print the fastest: python -m benchmarks.tune C D --write.

Every candidate's result is compared with that of the configuration in use before it is timed. Kernels are compiled
beforehand, several at a time, without touching the GPU. With --write the winners become rows of the device's file
scatter_ops/tuning/configs/sm_XY.json.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import statistics
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime.errors import TritonError

from benchmarks import offline, report, tuned_rows
from benchmarks.difference import relative_rms
from benchmarks.shapes import SHAPES, Shape, inputs, placeholders, shape_names
from benchmarks.timing import graph_ms, queued_ms
from scatter_ops import cuda, tuning
from scatter_ops.cuda.dispatch import regrouped
from scatter_ops.cuda.glu import Glu
from scatter_ops.cuda.glu_backward import glu_backward, num_column_tiles, sum_partials
from scatter_ops.cuda.glu_forward import glu_forward
from scatter_ops.cuda.grouped_gemm import NO_BIAS, grouped_gemm
from scatter_ops.cuda.operands import Routing, Rows, select_config
from scatter_ops.cuda.parameters import expert_weight
from scatter_ops.cuda.weight_grad import weight_grad
from scatter_ops.tuning import Config, ShapeClass

PHASE_OPS = {
    "gate_up": "glu_forward",
    "down": "grouped_gemm",
    "d_activation": "glu_backward",
    "d_x": "grouped_gemm",
    "d_down": "weight_grad",
    "d_gate_up": "weight_grad",
}
SHARES = {  # of a phase in the products of a forward pass
    "gate_up": 2 / 3,
    "down": 1 / 3,
    "d_activation": 1 / 3,
    "d_x": 2 / 3,
    "d_down": 1 / 3,
    "d_gate_up": 2 / 3,
}
FEW_ROWS = 128  # for each expert: fewer make kernels so short that only a CUDA graph times them
TOLERANCE = 2e-2  # relative RMS difference of two bf16 results of one product
HOPPER = Config(128, 256, 64, num_warps=8, num_stages=3, programs_per_sm=1, tma=True)
FLOAT32 = Config(64, 128, 32, num_warps=2, num_stages=3)


def variants(base: Config, **axes: Any) -> Iterator[Config]:
    configs = [base]
    for name, values in axes.items():
        configs = [dataclasses.replace(config, **{name: value}) for config in configs for value in values]
    yield from configs


def candidates(op: str, rows_per_expert: int, dtype: torch.dtype) -> list[Config]:
    if rows_per_expert < FEW_ROWS:
        block_m = max(16, 1 << (rows_per_expert - 1).bit_length())
        base = Config(block_m, 128, 64, num_warps=4, num_stages=4, epilogue_parts=2)
        return [
            *variants(base, block_n=[64, 128], block_k=[64, 128], tma=[False, True], tma_out=[False]),
            *variants(base, block_n=[128], block_k=[128], num_stages=[3], tma=[False, True], tma_out=[False]),
            *variants(base, block_n=[64], block_k=[128], num_stages=[6], tma=[False, True], tma_out=[False]),
        ]
    if dtype == torch.float32:
        # Two warps, and tiles of 32 rows, make Triton take the older tensor core instructions on Hopper.
        base = dataclasses.replace(FLOAT32, epilogue_parts=2 if op == "glu_backward" else 1)
        return [
            *variants(base, block_m=[64, 128], block_n=[64, 128], block_k=[16, 32], num_warps=[2, 4]),
            *variants(base, block_m=[32], block_n=[128, 256], num_warps=[4, 8]),
            *variants(base, block_m=[128], block_n=[128, 256], num_warps=[8], num_stages=[3, 4]),
        ]
    if op == "glu_backward":
        return [
            *variants(
                HOPPER, overlap=[True], num_stages=[4], epilogue_parts=[8], regroup=[False, True], group_m=[1, 8]
            ),
            *variants(HOPPER, epilogue_parts=[4, 8], tma_out=[False, True], regroup=[True], group_m=[1]),
            *variants(HOPPER, epilogue_parts=[8], tma_out=[False, True], regroup=[True], group_m=[4, 8]),
            *variants(HOPPER, epilogue_parts=[8], num_stages=[4], regroup=[False, True], group_m=[1]),
        ]
    if op == "weight_grad":
        return [
            *variants(HOPPER, regroup=[True], group_m=[1, 8, 16], tma_out=[False, True]),
            *variants(HOPPER, regroup=[False, True], overlap=[True], group_m=[4, 8, 16]),
        ]
    if op == "glu_forward":
        return [
            *variants(HOPPER, overlap=[True], regroup=[False, True], tma_out=[False], group_m=[4, 8, 16]),
            *variants(HOPPER, num_stages=[3, 4], tma_out=[False], group_m=[1, 4, 8]),
            *variants(HOPPER, tma_out=[True], group_m=[8]),
            *variants(HOPPER, num_stages=[3, 4], regroup=[True], flatten=[True], tma_out=[False], group_m=[8]),
        ]
    return [
        *variants(HOPPER, flatten=[True], tma_out=[True], group_m=[1, 4, 8, 16]),
        *variants(HOPPER, flatten=[True], tma_out=[False], group_m=[8]),
        *variants(HOPPER, flatten=[False], tma_out=[False], group_m=[8], num_stages=[4]),
    ]


def phases(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A function that runs each GEMM phase of a training step."""
    layer = inputs(shape, dtype, device) if device == "cuda" else placeholders(shape, dtype)
    routing = Routing(*cuda.route(layer.topk_ids, shape.E))
    gate_up, down = expert_weight([layer.gate_up], False), expert_weight([layer.down], False)
    x, grad = Rows(layer.x, shape.K), Rows(layer.grad_out, shape.K)
    weights = layer.topk_weights
    h_NH = torch.empty(shape.T * shape.K, 2 * shape.F, device=device, dtype=dtype)
    a_NF = torch.empty(shape.T * shape.K, shape.F, device=device, dtype=dtype)
    if device == "cuda":
        h_NH.normal_()
        a_NF.normal_()
    glu = Glu(routing, weights, NO_BIAS, NO_BIAS, "silu", "concatenated", False, 0.0, 0.0)

    def activation():
        return glu_forward(x, gate_up.in_two_ways(), glu, save_h=True)

    def d_activation():
        # With the sort into grouped order that its config may ask for, which the weight gradient shares then.
        config = select_config("glu_backward", h_NH, routing, shape.F, shape.D)
        rows = regrouped(grad, routing) if config.regroup else grad
        partials = num_column_tiles(h_NH, down.transposed(), glu)
        result = glu_backward(rows, h_NH, down.transposed(), glu, True, False, True, partials, overwrite_h=False)
        assert result.partials is not None
        return result.grad_h_NH, result.scaled_a_NF, sum_partials(result.partials, glu)

    def product(rows, weight):
        return lambda: (grouped_gemm(rows, weight, NO_BIAS, routing, scatter=False, zero_unrouted=False),)

    def reduction(left, right):
        return lambda: (weight_grad(left, right, routing),)

    return {
        "gate_up": activation,
        "down": product(Rows(a_NF, 0), down),
        "d_activation": d_activation,
        "d_x": product(Rows(h_NH, 0), gate_up.transposed()),
        "d_down": reduction(grad, Rows(a_NF, 0)),
        "d_gate_up": reduction(Rows(h_NH, 0), x),
    }


def tune(name: str, dtype: torch.dtype, only: Collection[str], rounds: int) -> list[dict[str, Any]]:
    """One row per phase and candidate: its time and TFLOP/s, or why it was dropped."""
    rows = []
    for phase, run in phases(SHAPES[name], "cuda", dtype).items():
        if phase in only:
            rows += tune_phase(name, phase, run, dtype, rounds)
    return rows


def tune_phase(name: str, phase: str, run: Callable[[], Any], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The candidates take turns, with the configuration in use among them."""
    shape, op = SHAPES[name], PHASE_OPS[phase]
    asked, in_use = _in_use(op, run)
    expected, few = run(), shape.rows_per_expert < FEW_ROWS
    rows = {
        config: {
            "shape": name,
            "phase": phase,
            "config": dataclasses.asdict(config),
            **asked,
            "in_use": config == in_use,
        }
        for config in [in_use, *candidates(op, shape.rows_per_expert, dtype)]
    }
    for config, row in rows.items():
        if failure := _failure(config, run, expected):
            row["dropped"] = failure
    times: dict[Config, list[float]] = {config: [] for config, row in rows.items() if "dropped" not in row}
    for _ in range(rounds):
        for config, measured in times.items():
            with _selecting(config):
                measured.append(graph_ms(run, repeats=5, warmup=1) if few else queued_ms(run, calls=5))
    for config, measured in times.items():
        rows[config]["ms"] = statistics.median(measured)
        rows[config]["tflops"] = shape.forward_flops * SHARES[phase] / rows[config]["ms"] / 1e9
    for config, row in rows.items():
        result = row.get("dropped") or f"{row['ms']:.3f} ms {row['tflops']:.0f}"
        print(name, phase, _short(config), result, flush=True)
    return list(rows.values())


def _failure(config: Config, run: Callable[[], Any], expected: Any) -> str | None:
    """Why a candidate can't be used, or None."""
    try:
        with _selecting(config):
            error = max(relative_rms(a, b) for a, b in zip(run(), expected, strict=True))
    except (RuntimeError, TritonError) as exception:
        return f"{type(exception).__name__}: {exception}"[:200]
    return None if error <= TOLERANCE else f"relative RMS error {error:.2g}"


def precompile(name: str, dtype: torch.dtype, only: Collection[str], workers: int) -> None:
    """Fill Triton's disk cache with every candidate, before the GPU is used."""
    jobs = [
        (name, phase, i)
        for phase, op in PHASE_OPS.items()
        if phase in only
        for i in range(len(candidates(op, SHAPES[name].rows_per_expert, dtype)))
    ]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for failure in pool.map(_compile_candidate, jobs, [dtype] * len(jobs)):
            if failure:
                print(failure, flush=True)


def _compile_candidate(job: tuple[str, str, int], dtype: torch.dtype) -> str | None:
    name, phase, index = job
    # The number of tokens isn't part of a compiled kernel: few keep the tensors small.
    with offline.recorded((9, 0)) as launches:
        run = phases(SHAPES[name]._replace(T=1024), "cpu", dtype)[phase]
        config = candidates(PHASE_OPS[phase], SHAPES[name].rows_per_expert, dtype)[index]
        with _selecting(config):
            run()
    try:
        for launch in launches:
            offline.compile_launch(launch)
    except Exception as error:  # noqa: BLE001 - a candidate that doesn't compile is reported again when it is timed
        return f"{job} {_short(config)}: {error!r}"[:300]
    return None


def _selecting(config: Config):
    return mock.patch.object(
        tuning, "select", lambda op, capability, shape, *rest: tuning.fit(op, config, shape, (9, 0), rest[0])
    )


def _in_use(op: str, run: Callable[[], Any]) -> tuple[dict[str, Any], Config]:
    """What a phase asks for (shape class, of float32 the kind of product), and the configuration that it gets today."""
    asked: list[tuple[dict[str, Any], Config]] = []

    def select(op_of_call: str, capability: tuple[int, int], shape: ShapeClass, *rest: Any) -> Config:
        config = tuning_select(op_of_call, capability, shape, *rest)
        if op_of_call == op:
            dtype, precision, k_major = rest
            products = {"precision": precision, "k_major": k_major} if dtype == torch.float32 else {}
            asked.append(({"shape_class": shape, "products": products}, config))
        return config

    tuning_select = tuning.select
    with mock.patch.object(tuning, "select", select):
        run()
    return asked[0]


def _short(config: Config) -> str:
    default = Config(0, 0, 0)
    changed = {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(default, k) or k == "group_m"}
    return " ".join(f"{k}={int(v)}" for k, v in changed.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--phases", nargs="+", default=list(PHASE_OPS), choices=PHASE_OPS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--precision", default="highest", choices=("highest", "high"), help="of float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--write", action="store_true", help="put the winners into the device's file of configurations")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: configurations are timed where they are to be used")
    torch.set_float32_matmul_precision(arguments.precision)
    dtype, names = getattr(torch, arguments.dtype), shape_names(parser, arguments.shapes, default=list(SHAPES))
    for name in names:
        precompile(name, dtype, arguments.phases, arguments.workers)
    rows = [row for name in names for row in tune(name, dtype, arguments.phases, arguments.rounds)]
    best = tuned_rows.winners(rows)
    report.append("tune", rows, dtype=arguments.dtype)
    report.print_table("faster than in use", [{**row, "config": json.dumps(row["config"])} for row in best])
    if arguments.write and best:
        path = tuning.config_file(torch.cuda.get_device_capability())
        known = json.loads(path.read_text()) if path.exists() else []
        new = [
            tuned_rows.row_of(
                PHASE_OPS[row["phase"]], row["shape_class"], dtype, Config(**row["config"]), **row["products"]
            )
            for row in best
        ]
        tuned_rows.write(path, tuned_rows.merged(known, new))


if __name__ == "__main__":
    main()
