"""`ParallelLinear`: a stack of linear layers, one an expert, from which any expert module can be built.

T tokens, K experts per token, N = T * K slots, E experts.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from scatter_moe.arguments import at_least_one
from scatter_moe.dispatch import Dispatch


class ParallelLinear(nn.Module):
    """`y = x W_e^T + b_e` for each slot with its expert e, in one grouped GEMM that copies no rows.

    Parameters are a stack of `nn.Linear`'s: `weight` `[E, out, in]` and `bias` `[E, out]`, initialised alike.

        up, down = ParallelLinear(E, D, F), ParallelLinear(E, F, D)
        dispatch = Dispatch.of_ids(topk_ids, E)
        h = F.gelu(up(x, dispatch, rows_out="grouped"))
        y = down(h, dispatch, rows_in="grouped").unflatten(0, (-1, K))
        out = (y * topk_weights[..., None]).sum(1)

    Args:
        num_experts: E.
        in_features, out_features: widths of each expert's layer.
        bias: whether each expert has one.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for a size that isn't a whole number of at least 1.

    Source: ParallelLinear of ScatterMoE (arXiv 2403.08245).
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least_one(num_experts=num_experts, in_features=in_features, out_features=out_features)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, each expert's as `nn.Linear` does."""
        reset_like_linear(self.in_features, self.weight, self.bias)

    def forward(
        self,
        x: Tensor,
        dispatch: Dispatch,
        *,
        rows_in: Literal["tokens", "slots", "grouped"] = "tokens",
        rows_out: Literal["slots", "grouped"] = "slots",
    ) -> Tensor:
        """Multiplies each slot's row with its expert's weight.

        Args:
            x: float16, bfloat16, float32 or float64, of the parameters' dtype. `[T, in]` if rows_in is "tokens": each
                row is read by its token's K slots. `[N, in]` in slot order if "slots", sorted by expert if "grouped".
            dispatch: which slots go to which expert.
            rows_in: what the rows of x are.
            rows_out: "slots" for slot order, "grouped" for rows sorted by expert.

        Returns:
            `[N, out]` in x's dtype. Rows of slots without an expert are zero, without the bias.

        Raises:
            TypeError, ValueError: naming the argument that isn't as above.
        """
        if rows_in not in ("tokens", "slots", "grouped"):
            raise ValueError(f"rows_in: got {rows_in!r}, accepted are 'tokens', 'slots' and 'grouped'")
        if rows_out not in ("slots", "grouped"):
            raise ValueError(f"rows_out: got {rows_out!r}, accepted are 'slots' and 'grouped'")
        if not isinstance(dispatch, Dispatch):
            raise TypeError(
                f"dispatch: got {type(dispatch).__name__}, accepted is what Dispatch.of_ids(topk_ids, E) returns"
            )
        return torch.ops.scatter_moe.parallel_linear(
            x,
            [self.weight],
            dispatch.order,
            dispatch.offsets,
            dispatch.top_k if rows_in == "tokens" else 1,
            rows_in == "grouped",
            rows_out == "grouped",
            [] if self.bias is None else [self.bias],
        )

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def reset_like_linear(in_features: int, *parameters: Tensor | None) -> None:
    """`nn.Linear`'s initialisation: weight and bias are uniform within 1 / sqrt(in_features)."""
    bound = 1 / math.sqrt(in_features) if in_features else 0.0
    for parameter in parameters:
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)
