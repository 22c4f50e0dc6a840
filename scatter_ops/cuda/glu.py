"""What the two halves of the expert MLP's first layer, glu_forward and glu_backward, share about it.

T tokens, K experts per token, N slots, F expert width, H columns of h (F, gated 2 F).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from scatter_ops.cuda.operands import Routing
from scatter_ops.cuda.parameters import ExpertBias, ExpertWeight, expert_weight, separate_weight


@dataclass(frozen=True)
class Glu:
    """on_input: the router weight multiplies the expert's input, else its output. topk_weights: [T, K], dense."""

    routing: Routing
    topk_weights: Tensor
    gate_bias: ExpertBias
    up_bias: ExpertBias
    activation: str
    layout: str
    on_input: bool
    alpha: float
    limit: float

    @property
    def top_k(self) -> int:
        return self.topk_weights.shape[1]

    @property
    def h_layout(self) -> str:
        """Column order of h: gate and up of the separate layout are stored side by side."""
        return "concatenated" if self.layout == "separate" else self.layout

    @property
    def bias_strides(self) -> tuple[int, int]:
        return self.gate_bias.stride_e, self.up_bias.stride_e

    @property
    def up_bias_kind(self) -> str:
        """Only the separate layout has a bias of its own for up."""
        return self.up_bias.kind if self.layout == "separate" else "within"

    def f_size(self, h_size: int) -> int:
        return h_size if self.layout == "plain" else h_size // 2

    def projections(self, h_NH: Tensor) -> tuple[Tensor, ...]:
        """The columns of h, or of its like, that belong to gate_up and, where it is apart, to up."""
        return h_NH.chunk(2, dim=1) if self.layout == "separate" else (h_NH,)

    def tiles_of_h(self, h_NH: Tensor, block_m: int, block_f: int) -> TensorDescriptor:
        """Descriptor to store tiles of h or its like: [N, H], or [N, 2, F] where gate and up are side by side."""
        if self.h_layout == "concatenated":
            return create_ragged_descriptor(h_NH.unflatten(1, (2, -1)), [block_m, 1, block_f])
        return create_ragged_descriptor(h_NH, [block_m, block_f if self.layout == "plain" else 2 * block_f])


def gate_up_weight(gate_up: Sequence[Tensor], up: Sequence[Tensor], layout: str, transposed: bool) -> ExpertWeight:
    """[E, 2, F, D] where gate and up are apart, [E, 1, H, D] for the plain and the interleaved layout."""
    if layout == "separate":
        return separate_weight(gate_up, up, transposed)
    weight = expert_weight(gate_up, transposed)
    return weight.in_two_ways() if layout == "concatenated" else weight
