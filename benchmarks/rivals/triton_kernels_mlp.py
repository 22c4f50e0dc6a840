"""github.com/triton-lang/triton, python/triton_kernels: routing from a bit matrix, then its grouped GEMM twice.

SwiGLU is fused into the first GEMM and the sum over a token's experts into the second one, rows of gate and up in turns
as its activations want them. It has no backward pass. Importing this file raises ImportError without the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_kernels import matmul_ogs, specialize, tensor  # pyright: ignore[reportMissingImports]

WORD = 32


@triton.jit
def swiglu(rows):
    gate, up = tl.split(tl.reshape(rows, (rows.shape[0], rows.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up.to(tl.float32)


@triton.jit
def set_bits(bits_ptr, ids_ptr, K: tl.constexpr, WORDS: tl.constexpr, WORD: tl.constexpr):
    """One bit for each expert of a token, one program a token."""
    token = tl.program_id(0)
    words = tl.arange(0, WORDS)
    bits = tl.zeros((WORDS,), tl.uint32)
    for k in tl.static_range(K):
        expert = tl.load(ids_ptr + token * K + k).to(tl.int32)
        one = tl.full((WORDS,), 1, tl.uint32)
        bits |= tl.where(words == expert // WORD, one << (expert % WORD).to(tl.uint32), 0)
    tl.store(bits_ptr + token * WORDS + words, bits)


ACTIVATION = matmul_ogs.FusedActivation(specialize.FnSpecs("plain_swiglu", swiglu, (), reduction_n=2), ())


def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    (num_tokens, top_k), num_experts = topk_ids.shape, down.shape[0]
    ids = topk_ids.to(torch.int16)
    words = triton.next_power_of_2(triton.cdiv(num_experts, WORD))
    bits = torch.empty(num_tokens, words, dtype=torch.uint32, device=x.device)
    set_bits[(num_tokens,)](bits, ids, top_k, words, WORD)
    mask = tensor.Bitmatrix(
        bits, dtype=tensor.BIT, shape=[num_tokens, words * WORD], shape_max=[num_tokens, words * WORD]
    )
    slots = tensor.make_bitmatrix_metadata(ids, mask)
    by_expert, places = slots.col_sorted_indx, slots.row_sorted_indx
    counts = slots.col_sum[:num_experts]
    experts = tensor.make_ragged_tensor_metadata(counts, num_tokens * top_k)
    weights = topk_weights.flatten()[by_expert]
    routing = matmul_ogs.RoutingData(weights, experts.slice_sizes, num_experts, top_k, experts)
    to_rows, from_rows = matmul_ogs.GatherIndx(by_expert, places), matmul_ogs.ScatterIndx(places, by_expert)
    rows = matmul_ogs.matmul_ogs(x, gate_up.mT, None, routing, gather_indx=to_rows, fused_activation=ACTIVATION)
    return matmul_ogs.matmul_ogs(rows, down.mT, None, routing, scatter_indx=from_rows, gammas=weights)
