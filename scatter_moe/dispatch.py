"""Where the rows of a Mixture-of-Experts layer go: the slots of all tokens sorted by expert.

T tokens, K experts per token, N = T * K slots, E experts. Slot n = t * K + k is token t's k-th choice.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """The slots sorted by expert. One serves all layers that send the same tokens to the same experts.

    Attributes:
        order: int32 `[N]`, the slots sorted by expert; grouped row i belongs to slot `order[i]`. An expert's slots come
            by token on CUDA, and choice by choice on the CPU, where those of a choice come by token.
        offsets: int32 `[E]`, where each expert's grouped rows end (as `torch.nn.functional.grouped_mm` takes them).
        top_k: K, the number of slots of a token.

    Source: ScatterMoE (arXiv 2403.08245).
    """

    order: Tensor
    offsets: Tensor
    top_k: int

    @classmethod
    def of_ids(cls, topk_ids: Tensor, num_experts: int) -> "Dispatch":
        """Sorts the slots of `topk_ids`.

        Args:
            topk_ids: int32 or int64 `[T, K]`. An id outside 0..E-1 goes to no expert: its slot's rows are zero.
            num_experts: E.

        Raises:
            TypeError, ValueError: naming the argument that isn't as above.
        """
        order, offsets = torch.ops.scatter_moe.route(topk_ids, num_experts)
        return cls(order, offsets, topk_ids.shape[1])

    @classmethod
    def of_counts(cls, num_tokens_per_expert: Tensor, num_rows: int) -> "Dispatch":
        """For rows that are grouped by expert already: row i is slot i of the only choice of token i.

        Args:
            num_tokens_per_expert: whole numbers `[E]` of any dtype (`torch.histc` gives floats), none negative and not
                more than N in sum, which the operators check on the CPU alone: elsewhere that would wait for the
                device. Rows past their sum belong to no expert.
            num_rows: N.
        """
        offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        return cls(torch.arange(num_rows, dtype=torch.int32, device=offsets.device), offsets, 1)
