"""What `make tune` writes is what `tuning.select` reads."""

import json

import pytest
import torch

from benchmarks import tuned_rows
from scatter_ops import tuning
from scatter_ops.tuning import Config, ShapeClass

OURS, OTHER = ShapeClass(256, 1536, 2048), ShapeClass(512, 1536, 2048)
HOPPER, BF16 = (9, 0), torch.bfloat16
SLOW, FAST = Config(128, 128, 64, num_stages=2), Config(128, 256, 64, num_stages=3, group_m=4)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """The shipped files, where they may be changed."""
    for file in tuning.CONFIGS.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    yield tmp_path
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    tuning.select.cache_clear()
    tuning._rows.cache_clear()


def _add(op: str, config: Config) -> None:
    path = tuning.config_file(HOPPER)
    known = json.loads(path.read_text())
    tuned_rows.write(path, tuned_rows.merged(known, [tuned_rows.row_of(op, OURS, BF16, config)]))
    _forget()


def test_a_winner_is_selected_for_its_shape_class_alone(configs):
    before = {op: tuning.select(op, HOPPER, OURS, BF16) for op in ("glu_forward", "grouped_gemm")}
    elsewhere = tuning.select("glu_forward", HOPPER, OTHER, BF16)
    _add("glu_forward", FAST)
    assert tuning.select("glu_forward", HOPPER, OURS, BF16) == FAST != before["glu_forward"]
    assert tuning.select("glu_forward", HOPPER, OTHER, BF16) == elsewhere
    assert tuning.select("grouped_gemm", HOPPER, OURS, BF16) == before["grouped_gemm"]


def test_a_later_winner_takes_the_place_of_an_earlier(configs):
    rows = len(json.loads(tuning.config_file(HOPPER).read_text()))
    _add("glu_forward", SLOW)
    _add("glu_forward", FAST)
    assert tuning.select("glu_forward", HOPPER, OURS, BF16) == FAST
    assert len(json.loads(tuning.config_file(HOPPER).read_text())) == rows + 1


def test_a_winner_of_float32_is_selected_for_its_kind_of_product_alone(configs):
    path, kind = tuning.config_file(HOPPER), ("tf32", True)
    row = tuned_rows.row_of("grouped_gemm", OURS, torch.float32, FAST, precision=kind[0], k_major=kind[1])
    tuned_rows.write(path, tuned_rows.merged(json.loads(path.read_text()), [row]))
    _forget()
    for others in (("ieee", True), ("tf32", False)):
        assert tuning.select("grouped_gemm", HOPPER, OURS, torch.float32, *others) != FAST
    selected = tuning.select("grouped_gemm", HOPPER, OURS, torch.float32, *kind)
    assert (selected.block_m, selected.block_n) == (FAST.block_m, FAST.block_n)


def test_only_what_is_clearly_faster_wins():
    def row(phase: str, ms: float | None, in_use: bool) -> dict:
        return {"shape": "D", "phase": phase, "in_use": in_use} | ({} if ms is None else {"ms": ms})

    measured = [
        *(row("down", 1.0, True), row("down", 0.99, False)),  # noise
        *(row("d_x", 1.0, True), row("d_x", 0.9, False), row("d_x", 0.8, False), row("d_x", None, False)),
    ]
    assert tuned_rows.winners(measured) == [row("d_x", 0.8, False)]
