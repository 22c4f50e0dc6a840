"""Where kernels find the parameters of experts: in a stack, in what lies as a stack would, by addresses, in a copy."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from scatter_ops.cuda.parameters import ExpertWeight, expert_weight, separate_weight

E, N, K = 3, 8, 16


def scattered(*sizes: int) -> list[Tensor]:
    """Not equally spaced."""
    buffer = torch.randn(3 * E, *sizes)
    return [buffer[e * (e + 1)] for e in range(E)]


GATE, UP = torch.randn(2, E, N, K)
SEPARATE = {
    "stacks": ([GATE], [UP], "strided"),
    "stacks, up first": ([UP], [GATE], "list"),
    "views of stacks": (list(GATE), list(UP), "strided"),
    "lists": (scattered(N, K), scattered(N, K), "list"),
    "one stack, one list": (list(GATE), scattered(N, K), "list"),
    "other strides": ([GATE], [UP.transpose(1, 2).contiguous().transpose(1, 2)], "copy"),
    "not aligned": ([w.flatten()[1:97].view(6, K) for w in scattered(N, K)], scattered(6, K), "copy"),
}


def assert_reads(weight: ExpertWeight, ways: list[list[Tensor]], kind: str) -> None:
    """A kernel would read those tensors, by strides or by addresses: all experts of one way, then of the next."""
    if kind == "list":
        assert weight.is_list and weight.addresses is not None and weight.lowest is not None
        pointers = [tensor.data_ptr() for tensors in ways for tensor in tensors]
        distances = weight.addresses.distances * weight.addresses.spacing
        assert weight.addresses.pointers.tolist() == pointers
        assert (weight.lowest.data_ptr() + distances).tolist() == pointers
        assert weight.experts_per_way == (len(ways[0]) if len(ways) > 1 else 0)
        return
    assert not weight.is_list
    sizes = (weight.ways, weight.num_experts, weight.n, weight.k)
    strides = (weight.stride_way, weight.stride_e, weight.stride_n, weight.stride_k)
    found = weight.data.as_strided(sizes, strides)
    assert torch.equal(found, torch.stack([torch.stack(tensors) for tensors in ways]))
    assert (weight.data.data_ptr() == ways[0][0].data_ptr()) == (kind == "strided")


@pytest.mark.parametrize("case", SEPARATE)
def test_gate_and_up_in_tensors_of_their_own(case: str):
    gate, up, kind = SEPARATE[case]
    tensors = [list(stack[0]) if stack[0].dim() == 3 else list(stack) for stack in (gate, up)]
    assert_reads(separate_weight(gate, up, transposed=False), tensors, kind)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [([GATE], "strided"), (list(GATE), "strided"), (list(GATE[:1]), "strided"), (scattered(N, K), "list")],
    ids=["stack", "views", "one expert", "list"],
)
def test_one_weight(tensors: list[Tensor], kind: str):
    experts = list(tensors[0]) if tensors[0].dim() == 3 else tensors
    assert_reads(expert_weight(tensors, transposed=False), [experts], kind)
