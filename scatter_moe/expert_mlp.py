"""`ExpertMLP`: the (gated) MLPs of all experts as one module on the fused operator.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

import torch
from torch import Tensor, nn

from scatter_moe.arguments import at_least_one, one_count_per_expert
from scatter_moe.dispatch import Dispatch
from scatter_moe.distributed.columns import on_columns
from scatter_moe.distributed.exchange import Exchange, local_experts, zeros_of
from scatter_moe.parallel_linear import reset_like_linear
from scatter_ops.checks import mlp_options

# The projections before the activation, in the operator's order.
_FIRST_PROJECTIONS = {
    "concatenated": ("gate_up_proj",),
    "interleaved": ("gate_up_proj",),
    "separate": ("gate_proj", "up_proj"),
    "plain": ("up_proj",),
}


class ExpertMLP(nn.Module):
    """E expert MLPs: `out[t] = sum_k s[t, k] * (act(x W_gate^T) * (x W_up^T)) W_down^T`, s the router's weights.

    What is kept for the backward pass is x, the product of the first GEMM, the router's weights and the routing; what
    only frozen parameters would read is neither kept nor computed.

    | layout | parameters |
    |---|---|
    | "concatenated" | `gate_up_proj [E, 2F, D]`, gate rows first, and `down_proj [E, D, F]`: transformers' layout |
    | "interleaved" | the same with gate and up rows alternating |
    | "separate" | `gate_proj [E, F, D]`, `up_proj [E, F, D]`, `down_proj [E, D, F]`: torchtitan's w1, w3, w2 |
    | "plain" | `up_proj [E, F, D]`, `down_proj [E, D, F]`: no gate, `out = act(x W_up^T) W_down^T` |

    With `bias` each has one beside it: `gate_up_proj_bias [E, 2F]`, `down_proj_bias [E, D]`, ...

    Args:
        num_experts: E.
        d_model: D.
        d_expert: F.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu", "relu2" or, gated only, "clamped_swiglu"
            (`(clamp(up) + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`).
        layout: one of the table.
        bias: whether each projection has one.
        weight_on: "output", or "input" where the experts see s * x and their results are summed unweighted (llama4).
        alpha, limit: numbers of "clamped_swiglu".
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for a size that isn't a whole number of at least 1; for an activation, a layout or a
            weight_on that isn't one of these.

    Source: ScatterMoE (arXiv 2403.08245); what is kept for backward follows SonicMoE (arXiv 2512.14080).
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_expert: int,
        *,
        activation: str = "silu",
        layout: str = "concatenated",
        bias: bool = False,
        weight_on: str = "output",
        alpha: float = 1.702,
        limit: float = 7.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least_one(num_experts=num_experts, d_model=d_model, d_expert=d_expert)
        mlp_options(activation, layout, weight_on)
        self.num_experts, self.d_model, self.d_expert = num_experts, d_model, d_expert
        self.activation, self.layout, self.weight_on = activation, layout, weight_on
        self.alpha, self.limit = alpha, limit
        self.exchange: Exchange | None = None  # set by ExpertParallel
        width = 2 * d_expert if layout in ("concatenated", "interleaved") else d_expert
        shapes = dict.fromkeys(_FIRST_PROJECTIONS[layout], (num_experts, width, d_model))
        shapes["down_proj"] = (num_experts, d_model, d_expert)
        for name, shape in shapes.items():
            weight = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(weight.new_empty(shape[:2])) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, each expert's as `nn.Linear` does."""
        for name in (*_FIRST_PROJECTIONS[self.layout], "down_proj"):
            weight = getattr(self, name)
            reset_like_linear(weight.shape[-1], weight, getattr(self, f"{name}_bias"))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sends each token through its K experts and adds up what they give.

        Args:
            x: `[T, D]`, of the parameters' dtype.
            topk_ids: int32 or int64 `[T, K]`. An id outside 0..E-1 contributes nothing.
            topk_weights: `[T, K]`, any floating-point dtype.

        Returns:
            `[T, D]` in x's dtype, accumulated over K in fp32.

        Raises:
            TypeError, ValueError: naming the argument that isn't as above.
        """
        if self.exchange is not None:
            return self.exchange(self.run_local, x, topk_ids, topk_weights)
        order, offsets, _ = Dispatch.of_ids(topk_ids, self.num_experts)
        return self._mlp(x, topk_weights, order, offsets)

    def forward_grouped(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """For rows that were dispatched already, as after the all-to-all of expert parallelism. No router weights.

        Args:
            x: `[M, D]`, rows sorted by expert.
            num_tokens_per_expert: whole numbers `[E]` of any dtype (`torch.histc` gives floats), none negative and not
                more than M in sum. Rows past their sum are padding and give zeros. Where the parameters are DTensors
                that are sharded by experts: of this rank's experts.

        Returns:
            `[M, D]` in the order of x. All NaN on a GPU if the counts are more than M in sum: an error would wait for
            the device.

        Raises:
            TypeError, ValueError: naming the argument that isn't as above; for negative counts nothing is raised.
        """
        one_count_per_expert(num_tokens_per_expert, self._stacked("down_proj")[0].shape[0])
        num_rows = x.shape[0]
        weights = x.new_ones(num_rows, 1)
        order, offsets, _ = Dispatch.of_counts(num_tokens_per_expert, num_rows)
        if x.device.type != "cpu":  # there the operator raises
            weights.masked_fill_(num_tokens_per_expert.sum() > num_rows, torch.nan)
            offsets.clamp_(max=num_rows)
        return self._mlp(x, weights, order, offsets)

    def run_local(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Under `ExpertParallel`: this rank's experts on tokens that were exchanged; ids count from its first."""
        assert self.exchange is not None
        num_local, columns = self.exchange.partition.num_local, self.exchange.columns
        if num_local == 0:
            return zeros_of(x, topk_weights, *self.parameters())
        order, offsets, _ = Dispatch.of_ids(topk_ids, num_local)
        if columns is None:
            return self._mlp(x, topk_weights, order, offsets)
        return on_columns(columns, self._mlp, x, topk_weights, order, offsets)

    def _mlp(self, x: Tensor, topk_weights: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        first, *second = _FIRST_PROJECTIONS[self.layout]
        return torch.ops.scatter_moe.mlp(
            x,
            topk_weights,
            order,
            offsets,
            self._stacked(first),
            self._stacked(*second),
            self._stacked("down_proj"),
            self._stacked(f"{first}_bias"),
            self._stacked(*(f"{name}_bias" for name in second)),
            self._stacked("down_proj_bias"),
            self.activation,
            self.layout,
            False,
            self.weight_on,
            self.alpha,
            self.limit,
        )

    def _stacked(self, *names: str) -> list[Tensor]:
        """Parameters as the operator takes them: a list, empty where there is none."""
        parameters = [getattr(self, name) for name in names]
        given = [parameter for parameter in parameters if parameter is not None]
        local = local_experts if self.exchange is None else self.exchange.local
        return [local(parameter) for parameter in given]

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, d_model={self.d_model}, d_expert={self.d_expert}, "
            f"activation={self.activation}, layout={self.layout}, bias={self.down_proj_bias is not None}"
        )
