"""The models whose first training step `benchmarks.compile_time` times, by kind.

    stacked       a hit loop over stacked weights
    modules       a loop over a ModuleList of experts
    one buffer    the same after scatter_moe.stack_experts
    floor         the same ModuleList, router and residuals; each layer hands all its parameters to one stub operator
    routed dense  the same model with one MLP in place of the experts, times the sum of the router's weights
    dense         the same model with one MLP in place of router and experts
    qwen3         transformers' Qwen3-MoE with its default experts, attention and norms, as small
    qwen3 dense   the same, with one MLP in place of each MoE block

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, D, FF, K = 64, 32, 32, 2
BATCH, VOCABULARY = 2, 128

REWRITTEN = ("stacked", "modules", "one buffer", "qwen3")


class Expert(nn.Module):
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(D, FF, bias=False)
        self.w2 = nn.Linear(FF, D, bias=False)
        self.w3 = nn.Linear(D, FF, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """A softmax top-k router; subclasses have the experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(D, num_experts, bias=False)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """topk_weights_TK and topk_ids_TK."""
        weights, ids = self.gate(x_TD).softmax(-1).topk(K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class Stacked(Router):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.gate_up = nn.Parameter(torch.randn(num_experts, 2 * FF, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, D, FF) / FF**0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.route(x_TD)
        out = torch.zeros_like(x_TD)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            slots, tokens = torch.where(mask[e[0]])
            gate, up = F.linear(x_TD[tokens], self.gate_up[e[0]]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down[e[0]])
            out.index_add_(0, tokens, rows * weights[tokens, slots, None])
        return out


class Modules(Router):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.experts = nn.ModuleList(Expert() for _ in range(num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.route(x_TD)
        out = torch.zeros_like(x_TD)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x_TD[tokens]) * weights[tokens, slots, None])
        return out


class Floor(Modules):
    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.route(x_TD)
        parameters = [parameter for e in self.experts for parameter in weights_of(e)]
        return torch.ops.scatter_moe_benchmark.stub(x_TD, weights, ids, parameters)


def weights_of(expert: Any) -> tuple[Tensor, Tensor, Tensor]:
    return expert.w1.weight, expert.w3.weight, expert.w2.weight


class Dense(Expert):
    def __init__(self, num_experts: int) -> None:
        super().__init__()


class RoutedDense(Router):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.mlp = Expert()

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, _ = self.route(x_TD)
        return self.mlp(x_TD) * weights.sum(-1, keepdim=True)


BLOCKS = {
    "stacked": Stacked,
    "modules": Modules,
    "one buffer": Modules,
    "floor": Floor,
    "routed dense": RoutedDense,
    "dense": Dense,
}
KINDS = (*BLOCKS, "qwen3", "qwen3 dense")


class Model(nn.Module):
    def __init__(self, kind: str, num_experts: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BLOCKS[kind](num_experts) for _ in range(num_layers))

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD)
        return x_TD


class Qwen3(nn.Module):
    def __init__(self, kind: str, num_experts: int, num_layers: int) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        size = {
            "vocab_size": VOCABULARY,
            "hidden_size": D,
            "intermediate_size": FF,
            "moe_intermediate_size": FF,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": D // 2,
            "num_experts": num_experts,
            "num_experts_per_tok": K,
            "mlp_only_layers": list(range(num_layers)) if kind == "qwen3 dense" else [],
        }
        self.model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, use_cache=False))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def make(kind: str, num_experts: int, num_layers: int) -> tuple[nn.Module, Tensor]:
    """A model and its input."""
    if kind in BLOCKS:
        return Model(kind, num_experts, num_layers), torch.randn(T, D)
    return Qwen3(kind, num_experts, num_layers), torch.randint(VOCABULARY, (BATCH, T // BATCH))


LIBRARY = torch.library.Library("scatter_moe_benchmark", "DEF")


def define_stub() -> None:
    """An operator of all parameters of a layer, with a backward operator: all that is trained gets a gradient."""
    LIBRARY.define("stub(Tensor x, Tensor weights, Tensor ids, Tensor[] parameters) -> Tensor")
    LIBRARY.define("stub_backward(Tensor grad, Tensor weights, Tensor[] parameters) -> (Tensor, Tensor, Tensor)")

    def forward(x: Tensor, weights: Tensor, ids: Tensor, parameters: list[Tensor]) -> Tensor:
        return x * weights.sum()

    def backward(grad: Tensor, weights: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return grad.clone(), weights.clone(), grad.new_zeros(len(parameters), *parameters[0].shape)

    for name, function in (("stub", forward), ("stub_backward", backward)):
        LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"scatter_moe_benchmark::{name}", function, lib=LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], *inputs[3])

    def derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, *parameters = ctx.saved_tensors
        grad_x, grad_weights, grads = torch.ops.scatter_moe_benchmark.stub_backward(grad, weights, parameters)
        return grad_x, grad_weights, None, list(grads.unbind(0))

    torch.library.register_autograd("scatter_moe_benchmark::stub", derivative, setup_context=setup_context, lib=LIBRARY)


define_stub()
