"""torch.distributed.checkpoint: saved under one mesh, loaded under another, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from scatter_moe import expert_parameters
from tests.distributed.models import PARALLEL, SAME_TOKENS, loss, model, tokens


def make(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    network = PARALLEL[layout]("all_to_all") if layout != "alone" else model()
    experts = list(expert_parameters(network))
    rest = [parameter for parameter in network.parameters() if not any(parameter is expert for expert in experts)]
    return network, torch.optim.AdamW([{"params": experts}, {"params": rest}], fused=True)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments}


def full(tree: object) -> object:
    """Whole tensors in place of sharded ones."""
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    return tree.clone() if isinstance(tree, Tensor) else tree


def save_on_rank(layout: str, folder: Path) -> object:
    model, optimizer = make(layout)
    rank = dist.get_rank() // SAME_TOKENS.get(layout, 1) if dist.is_initialized() else 1
    for step in range(2):
        optimizer.zero_grad()
        loss(model, *tokens(rank, step)).backward()
        if layout in ("EP", "EP and TP"):
            for parameter in model.parameters():
                if not isinstance(parameter, DTensor):
                    dist.all_reduce(parameter.grad)
        optimizer.step()
    saved = state(model, optimizer)
    dcp.save(saved, checkpoint_id=folder)
    return full(saved)


def load_on_rank(layout: str, folder: Path) -> object:
    model, optimizer = make(layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = state(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return full(state(model, optimizer))


def leaves(tree: object, name: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in leaves(value, f"{name}/{key}").items()}


@pytest.mark.parametrize(
    ("saved_as", "loaded_as"),
    [
        ("EP", "EP and FSDP2"),
        ("EP and FSDP2", "EP"),
        ("EP and FSDP2", "FSDP2"),
        ("FSDP2", "EP and FSDP2"),
        ("EP and TP", "EP"),
        ("EP", "EP and TP"),
    ],
)
def test_saved_under_one_mesh_and_loaded_under_another(pool, tmp_path, saved_as, loaded_as):
    saved = pool.run(save_on_rank, saved_as, tmp_path)
    for before, after in zip(saved, pool.run(load_on_rank, loaded_as, tmp_path), strict=True):
        assert_same(before, after)


@pytest.mark.parametrize("layout", ["EP", "EP and FSDP2"])
def test_saved_on_four_ranks_and_loaded_by_one_process(pool, tmp_path, layout):
    saved, *_ = pool.run(save_on_rank, layout, tmp_path)
    assert_same(saved, load_on_rank("alone", tmp_path))


@pytest.mark.parametrize("layout", ["EP", "EP and FSDP2"])
def test_saved_by_one_process_and_loaded_on_four_ranks(pool, tmp_path, layout):
    saved = save_on_rank("alone", tmp_path)
    for loaded in pool.run(load_on_rank, layout, tmp_path):
        assert_same(saved, loaded)


def assert_same(before: object, after: object) -> None:
    """Bit for bit, moments of the optimizer included."""
    expected, got = leaves(before), leaves(after)
    assert got.keys() == expected.keys()
    tensors = [name for name, value in expected.items() if isinstance(value, Tensor)]
    assert any("exp_avg" in name for name in tensors)
    for name in tensors:
        assert torch.equal(got[name], expected[name]), name
