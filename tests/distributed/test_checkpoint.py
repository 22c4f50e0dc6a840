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
from tests.distributed.models import PARALLEL, loss, tokens


def make(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = PARALLEL[layout]("all_to_all")
    experts = list(expert_parameters(model))
    rest = [parameter for parameter in model.parameters() if not any(parameter is expert for expert in experts)]
    return model, torch.optim.AdamW([{"params": experts}, {"params": rest}], fused=True)


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
    for step in range(2):
        optimizer.zero_grad()
        loss(model, *tokens(dist.get_rank(), step)).backward()
        if layout == "EP":
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
    [("EP", "EP and FSDP2"), ("EP and FSDP2", "EP"), ("EP and FSDP2", "FSDP2"), ("FSDP2", "EP and FSDP2")],
)
def test_saved_under_one_mesh_and_loaded_under_another(pool, tmp_path, saved_as, loaded_as):
    saved = pool.run(save_on_rank, saved_as, tmp_path)
    for before, after in zip(saved, pool.run(load_on_rank, loaded_as, tmp_path), strict=True):
        expected, got = leaves(before), leaves(after)
        assert got.keys() == expected.keys()
        tensors = [name for name, value in expected.items() if isinstance(value, Tensor)]
        assert any("exp_avg" in name for name in tensors)
        for name in tensors:
            assert torch.equal(got[name], expected[name]), name
