"""The dense twin of a model: its MoE blocks are linear layers, or its experts a trivial registered function.

How many graphs the twin compiles to is how many the rest of the model needs.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.models.architectures import Architecture

TWIN = "scatter_moe_survey_twin"


def make_twin(architecture: Architecture, call: Callable[[nn.Module], Any]) -> nn.Module:
    """A model of the architecture without experts; `call` runs a model, to see what its blocks return."""
    if architecture.dispatched:
        moe = importlib.import_module("transformers.integrations.moe")
        moe.ALL_EXPERTS_FUNCTIONS.register(TWIN, _trivial_experts)
        return architecture.make(TWIN)
    model = architecture.make()
    blocks = {path: block for path, block in model.named_modules() if type(block).__name__ in architecture.blocks}
    dense = {path: _DenseAttention(block) if hasattr(block, "reduce") else _Dense() for path, block in blocks.items()}
    hooks = [
        block.register_forward_hook(dense[path].see) for path, block in blocks.items() if not hasattr(block, "map")
    ]
    call(model)
    for hook in hooks:
        hook.remove()
    for path, layer in dense.items():
        model.set_submodule(path, layer)
    return model


def _trivial_experts(self, hidden_states, top_k_index, top_k_weights):
    return hidden_states * top_k_weights.sum(-1, keepdim=True).to(hidden_states.dtype)


class _Dense(nn.Module):
    """Returns tensors of the same shapes as the block that it saw: each one linear in its input, or zeros for ids."""

    def see(self, _block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        width = inputs[0].shape[-1]
        rows = inputs[0].numel() // width
        self.seen, self.structure = pytree.tree_flatten(pytree.tree_map(torch.empty_like, output))
        self.weights = nn.ParameterList(torch.randn(width, leaf.numel() // rows) * width**-0.5 for leaf in self.seen)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        made = [
            (x @ weight).reshape(leaf.shape) if leaf.is_floating_point() else torch.zeros_like(leaf)
            for weight, leaf in zip(self.weights, self.seen, strict=True)
        ]
        return pytree.tree_unflatten(made, self.structure)


class _DenseAttention(nn.Module):
    """In place of a mixture of attention: query and output projection of each choice are those of expert 0."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def map(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        query = x @ self.block.input_linear.weight[0].t()
        return query.unsqueeze(2).repeat(1, 1, self.block.top_k, 1), self.block.router.layer(x).flatten(0, 1), None

    def reduce(self, x: torch.Tensor, _topology: None) -> torch.Tensor:
        return (x @ self.block.output_linear.weight[0].t()).sum(2) + self.block.bias
