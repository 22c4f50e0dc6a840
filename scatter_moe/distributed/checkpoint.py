"""This rank's experts under the names of checkpoints that have one tensor for each expert, as transformers' have.

E experts, D model width, F expert width.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from scatter_moe.expert_mlp import ExpertMLP

NAMES = {"gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}


def per_expert_state_dict(experts: ExpertMLP, prefix: str, names: Mapping[str, str] = NAMES) -> dict[str, Tensor]:
    """The weights of this rank's experts, to be loaded by `torch.distributed.checkpoint` slice by slice.

        state = scatter_moe.per_expert_state_dict(layer.moe.experts, "model.layers.0.mlp.experts.{}.")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder))

    The tensors share memory with the parameters, so that loading fills these. Of a safetensors file no rank reads more
    than its own experts, nor more of these than its own columns. Call it after `ExpertParallel` and before
    `fully_shard`; parameters may come from the meta device (`module.to_empty(device=...)`).

    Args:
        experts: divided by `ExpertParallel` or not, of any layout.
        prefix: of an expert's names, `{}` standing for its number among all.
        names: of the weights `[F, D]` of "gate" and "up" (an expert without gate has "up" alone) and `[D, F]` of
            "down"; those of Qwen, OLMoE and DeepSeek by default, for Mixtral w1, w3 and w2.

    Returns:
        A tensor for each expert and weight; a DTensor where columns are divided.

    Raises:
        ValueError: for experts with biases, and for parameters that FSDP has sharded.
    """
    if experts.down_proj_bias is not None:
        raise ValueError("experts: got biases, accepted are experts without")
    exchange = experts.exchange
    columns = None if exchange is None else exchange.columns
    first = 0 if exchange is None else exchange.partition.first
    num_dims = 0 if exchange is None else 1 if columns is None else 2
    state: dict[str, Tensor] = {}
    for weight, (stacked, placement) in _weights(experts, num_dims).items():
        for index, tensor in enumerate(stacked):
            whole = tensor if columns is None else DTensor.from_local(tensor, columns, [placement], run_check=False)
            state[prefix.format(first + index) + names[weight]] = whole
    return state


def _weights(experts: ExpertMLP, num_dims: int) -> dict[str, tuple[Tensor, Shard]]:
    """This rank's part of each projection, stacked, and how columns of one expert are sharded.

    num_dims: of the mesh that `ExpertParallel` divided the parameters on.
    """
    parameters = {}
    for name, parameter in experts.named_parameters(recurse=False):
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        if len(placements) != num_dims:
            raise ValueError(f"experts: got {name} with placements {placements}, accepted is before fully_shard")
        parameters[name] = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
    weights = {"down": (parameters["down_proj"], Shard(1))}
    if experts.layout == "concatenated":
        gate, up = parameters["gate_up_proj"].chunk(2, dim=1)
    elif experts.layout == "interleaved":
        gate, up = parameters["gate_up_proj"][:, 0::2], parameters["gate_up_proj"][:, 1::2]
    else:
        gate, up = parameters.get("gate_proj"), parameters["up_proj"]
    return weights | {"up": (up, Shard(0))} | ({} if gate is None else {"gate": (gate, Shard(0))})
