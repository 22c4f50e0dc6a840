"""A checkpoint of transformers into divided experts: bit for bit, and no rank reads another's.

E experts, D model width, F expert width.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from scatter_moe import ExpertMLP, ExpertParallel, per_expert_state_dict
from tests.distributed.pool import WORLD_SIZE

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

E, D, F = 6, 8, 4
BYTES = 4  # of a float32
PREFIX = "model.layers.0.mlp.experts.{}."


def save(folder: Path) -> nn.Module:
    """Qwen3-MoE as transformers saves it; returns its experts, which hold stacked gate and up."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": 2, "head_dim": 4}
    config = Qwen3MoeConfig(**size, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=32)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    return model.get_submodule("model").layers[0].mlp.experts


def stacked(experts: nn.Module, layout: str) -> dict[str, Tensor]:
    """What `ExpertMLP` of a layout is to hold."""
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    down = {"down_proj": experts.down_proj.detach()}
    if layout == "separate":
        return {"gate_proj": gate, "up_proj": up} | down
    both = torch.cat((gate, up), 1) if layout == "concatenated" else torch.stack((gate, up), 2).flatten(1, 2)
    return {"gate_up_proj": both} | down


class Counting:
    """safetensors' file, which counts the bytes of every slice that is read."""

    def __init__(self, sizes: list[int], safe_open: Callable, *args, **kwargs) -> None:
        self.sizes, self.file = sizes, safe_open(*args, **kwargs)

    def __enter__(self) -> "Counting":
        self.file.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def get_slice(self, name: str) -> "CountingSlice":
        return CountingSlice(self.sizes, self.file.get_slice(name))

    def get_tensor(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read whole")


class CountingSlice:
    def __init__(self, sizes: list[int], part) -> None:
        self.sizes, self.part = sizes, part

    def __getattr__(self, name: str):
        return getattr(self.part, name)

    def __getitem__(self, index) -> Tensor:
        tensor = self.part[index]
        self.sizes.append(tensor.nbytes)
        return tensor


def load_on_rank(folder: Path, layout: str, columns: int) -> tuple[dict[str, Tensor], list[int], int]:
    """Parameters as a whole, the bytes of each read, and the bytes of this rank's parameters."""
    with torch.device("meta"):
        experts = ExpertMLP(E, D, F, layout=layout)
    mesh = init_device_mesh("cpu", (WORLD_SIZE // columns, columns), mesh_dim_names=("ep", "tp"))
    parallelize_module(experts, mesh if columns > 1 else mesh["ep"], ExpertParallel())
    experts.to_empty(device="cpu")
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "safe_open", partial(Counting, sizes, safetensors.safe_open))
        state = per_expert_state_dict(experts, PREFIX)
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    parameters = dict(experts.named_parameters())
    local = sum(parameter.to_local().nbytes for parameter in parameters.values())
    return {name: parameter.full_tensor().detach() for name, parameter in parameters.items()}, sizes, local


@pytest.mark.parametrize(
    ("layout", "columns"), [("concatenated", 1), ("interleaved", 2), ("separate", WORLD_SIZE), ("separate", 1)]
)
def test_each_rank_reads_its_own_experts_and_columns(pool, tmp_path, layout, columns):
    expected = stacked(save(tmp_path), layout)
    for parameters, sizes, local in pool.run(load_on_rank, tmp_path, layout, columns):
        assert parameters.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(parameters[name], tensor), name
        assert sum(sizes) == local
        assert max(sizes, default=0) <= D * F * BYTES // columns


def after_fsdp() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    experts = ExpertMLP(E, D, F)
    parallelize_module(experts, mesh["ep"], ExpertParallel())
    fully_shard(experts, mesh=mesh["fsdp"])
    with pytest.raises(ValueError, match=r"^experts: got") as error:
        per_expert_state_dict(experts, PREFIX)
    return str(error.value)


def test_what_it_refuses(pool):
    assert all("fully_shard" in message for message in pool.run(after_fsdp))
    with pytest.raises(ValueError, match=r"^experts: got biases"):
        per_expert_state_dict(ExpertMLP(E, D, F, bias=True), PREFIX)
