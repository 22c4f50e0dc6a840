"""Experts that are modules of their own: whose are taken, whose are refused, and that nothing of them changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scatter_moe import from_modules
from tests.layers.cases import WIDTH, D, Expert


def mlp(*activation: nn.Module, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, width), *activation, nn.Linear(width, D))


class Fused(nn.Module):
    """Gate and up as halves of one layer; weights that are no Linear's."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(D, 2 * WIDTH)), nn.Parameter(torch.randn(WIDTH, D))

    def forward(self, x):
        gate, up = (x @ self.gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down


class ByKeyword(Expert):
    def forward(self, x):
        gate = F.linear(input=x, weight=self.gate.weight, bias=self.gate.bias)
        return self.down(F.silu(input=gate) * self.up(x))


MAKERS = {"separate": Expert, "fused": Fused, "by keyword": ByKeyword, "plain": lambda: mlp(nn.ReLU())}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_parameters_and_their_names_stay(make):
    torch.manual_seed(0)
    modules = nn.ModuleList(make() for _ in range(3))
    before = dict(modules.named_parameters())
    experts = from_modules(modules)
    after = dict(experts.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert list(experts) == list(modules)
    x, ids = torch.randn(5, D), torch.tensor([[0], [2], [2], [0], [0]])
    out = experts(x, ids, torch.ones(5, 1))
    torch.testing.assert_close(out[1:3], modules[2](x[1:3]))


class Residual(Expert):
    def forward(self, x):
        return x + super().forward(x)


class Noisy(Expert):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


class MixingRows(Expert):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Twice(Expert):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.gate(x))


class Shared(Expert):
    """Multiplies by something that isn't a parameter of the expert."""

    def forward(self, x):
        return super().forward(x) * torch.ones(D)


def hooked():
    expert = Expert()
    expert.down.register_forward_hook(lambda module, args, out: 2 * out)
    return expert


REFUSED = [Residual, Noisy, MixingRows, Shared, hooked, lambda: nn.Linear(D, D), lambda: mlp(nn.ReLU(), nn.Dropout())]


@pytest.mark.parametrize("make", REFUSED)
def test_refused(make):
    with pytest.raises(ValueError, match=r"experts\[1\]: got \w+, accepted is a \(gated\) MLP without hooks"):
        from_modules([Expert(), make()])


def test_gate_and_up_of_one_layer():
    """act(h) * h has gate and up from one parameter: right or refused, never wrong."""
    torch.manual_seed(0)
    module, x = Twice(), torch.randn(5, D)
    out = from_modules([module])(x, torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize(
    "other", [mlp(nn.GELU()), mlp(nn.ReLU(), width=32), mlp(nn.ReLU()).double()], ids=["activation", "width", "dtype"]
)
def test_experts_that_differ(other):
    with pytest.raises(ValueError, match=r"experts\[2\]: got .*, accepted is what experts\[0\] is"):
        from_modules([mlp(nn.ReLU()), mlp(nn.ReLU()), other])


def test_none():
    with pytest.raises(ValueError, match="experts: got none"):
        from_modules([])
