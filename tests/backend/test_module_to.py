"""`self.gate = self.gate.to(dtype)` in forward, as routers write that compute in float32.

Where nothing changes: `tests.backend.test_one_iteration`.
"""

import pytest
import torch
from torch import nn

from fx_passes.capture.modules_to import changes_nothing
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe
from tests.backend.test_one_iteration import Casts
from tests.zoo import hidden_states
from tests.zoo.case import Case
from tests.zoo.common import D, E


@pytest.fixture(autouse=True)
def _fresh():
    fresh_dynamo()


class GateThatCounts(nn.Linear):
    """Has an `_apply` of its own, as recurrent layers do."""

    def __init__(self):
        super().__init__(D, E)
        self.applied = 0

    def _apply(self, fn, recurse=True):
        self.applied += 1
        return super()._apply(fn, recurse)


class Counts(Casts):
    def __init__(self):
        super().__init__()
        self.gate = GateThatCounts()


class NoExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)

    def forward(self, x):
        self.gate = self.gate.to(torch.float32)
        return self.gate(x)


class Weight(torch.Tensor):
    pass


def make_two(block):
    case = Case(block.__name__, block)
    return case.make(), case.make()


def with_subclass(gate):
    gate.weight = nn.Parameter(gate.weight.detach().as_subclass(Weight))
    return gate


@pytest.mark.parametrize(
    ("gate", "wanted", "nothing"),
    [
        (nn.Linear(D, E), (torch.float32,), True),
        (nn.Linear(D, E), ("cpu",), True),
        (nn.Linear(D, E), (torch.ones(2),), True),
        (nn.Linear(D, E), (torch.float64,), False),
        (nn.Linear(D, E), ("meta",), False),
        (nn.Conv2d(D, E, 1), (torch.float32, False), True),
        (nn.BatchNorm1d(D), (torch.float32,), True),
        (nn.Identity(), (torch.int64,), False),
        (with_subclass(nn.Linear(D, E)), (torch.float32,), False),
        (nn.LSTM(D, D), (torch.float32,), False),
    ],
)
def test_what_is_asked(gate, wanted, nothing):
    """BatchNorm counts batches in int64. Eager refuses to make anything int64."""
    assert changes_nothing(gate, *wanted) == nothing


def test_another_memory_format_is_a_change():
    assert not changes_nothing(nn.Conv2d(D, E, 1), memory_format=torch.channels_last)


def to_other_dtype(gate):
    gate.to(torch.float64)


def add_buffer_in_other_dtype(gate):
    gate.register_buffer("scale", torch.ones((), dtype=torch.float64))


def add_gradient_in_other_dtype(gate):
    gate.weight.grad_dtype = None
    gate.weight.grad = torch.ones_like(gate.weight, dtype=torch.float64)


@pytest.mark.parametrize("change", [to_other_dtype, add_buffer_in_other_dtype, add_gradient_in_other_dtype])
def test_what_changes_after_compile_is_converted_as_in_eager(change):
    eager, module = make_two(Casts)
    compiled = compile_ours(module, inner="counting_eager")
    x = hidden_states(requires_grad=False)
    with torch.no_grad():
        compiled(x)
        change(eager.gate)
        change(module.gate)
        torch.testing.assert_close(compiled(x), eager(x))
    assert dtypes(module) == dtypes(eager) == {torch.float32}


def dtypes(module):
    """Of all that `.to` may change."""
    tensors = [*module.gate.parameters(), *module.gate.buffers(), *(p.grad for p in module.gate.parameters())]
    return {tensor.dtype for tensor in tensors if tensor is not None}


def test_a_method_of_the_module_itself_is_called():
    eager, module = make_two(Counts)
    x = hidden_states()
    assert_same(observe(compile_ours(module, inner="counting_eager"), module, x), observe(eager, eager, x))


def test_parameters_are_replaced_where_pytorch_is_told_so():
    eager, module = make_two(Casts)
    compiled = compile_ours(module, inner="counting_eager")
    x, weight = hidden_states(), module.gate.weight
    compiled(x)
    assert module.gate.weight is weight
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        assert_same(observe(compiled, module, x), observe(eager, eager, x))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert module.gate.weight is not weight


def test_without_experts_the_graphs_are_those_of_the_inner_backend():
    eager, module = make_two(NoExperts)
    x = hidden_states()
    observe(torch.compile(eager, backend="counting_aot_eager"), eager, x)
    stock = [[node.op for node in gm.graph.nodes] for gm in graphs]
    fresh_dynamo()
    observe(compile_ours(module), module, x)
    assert [[node.op for node in gm.graph.nodes] for gm in graphs] == stock
