"""Models without experts: the graphs, breaks, errors and results of the inner backend alone."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.zoo import hidden_states
from tests.zoo.case import Case
from tests.zoo.common import FF, D


class Plain(nn.Module):
    """One linear; what follows it makes the model."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)


class BooleanRows(Plain):
    def forward(self, x):
        y = self.linear(x).reshape(-1, D)
        return y[y[:, 0] > 0].sum(dim=0)


class BooleanAssignment(Plain):
    def forward(self, x):
        y = self.linear(x) * 1
        y[y > 1] = 0.5
        return y


class Nonzero(Plain):
    def forward(self, x):
        y = self.linear(x).reshape(-1, D)
        rows = (y[:, 0] > 0).nonzero().squeeze(-1)
        return y.index_select(0, rows).mean(dim=0) * rows.shape[0]


class ToList(Plain):
    def forward(self, x):
        sizes = [4, 8]
        counts = (x.detach() > 0).sum(dim=(0, 2)).tolist()
        return self.linear(x) * (counts[0] + sizes[1])


class ItemBranch(Plain):
    def forward(self, x):
        y = self.linear(x)
        if y.sum().item() > 0:
            return y * 2
        return y - 1


class TensorBranch(Plain):
    def forward(self, x):
        y = self.linear(x)
        if (y > 3).any():
            y = y.clamp(max=3)
        return y


class Bincount(Plain):
    def forward(self, x):
        ids = (x.detach().reshape(-1, D).argmax(dim=-1)) % 4
        counts = torch.bincount(ids, minlength=4).tolist()
        return self.linear(x) * max(counts)


class SplitBySizes(Plain):
    def forward(self, x):
        y = self.linear(x).reshape(-1, D)
        sizes = (y.detach()[:, 0] > 0).long().bincount(minlength=2).tolist()
        order = (y.detach()[:, 0] > 0).long().argsort(stable=True)
        first, second = y[order].split(sizes)
        return torch.cat((first * 2, second))


class LoopOverLayers(nn.Module):
    """A ModuleList walked with enumerate: not experts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x)) / (i + 1)
        return x


class MaskedBranches(nn.Module):
    """Two branches by sign, as experts would be, but each with its own function."""

    def __init__(self):
        super().__init__()
        self.positive, self.negative = nn.Linear(D, D), nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D))

    def forward(self, x):
        rows = x.reshape(-1, D)
        chosen = rows[:, 0] > 0
        out = torch.zeros_like(rows)
        out[chosen] = self.positive(rows[chosen])
        out[~chosen] = self.negative(rows[~chosen])
        return out


class LoopOverNonzero(Plain):
    """for i in nonzero, without experts."""

    def forward(self, x):
        y = self.linear(x).reshape(-1, D)
        total = torch.zeros(D)
        for row in (y[:, 0] > 1).nonzero():
            total = total + y[row].squeeze(0)
        return total


class Unique(Plain):
    def forward(self, x):
        y = self.linear(x).reshape(-1, D)
        labels = (y.detach()[:, 0] * 2).long()
        means = [y[labels == label].mean(dim=0) for label in labels.unique()]
        return torch.stack(means)


class IndexAddByClass(Plain):
    """Class means by index_add: a segment sum, not a layer of experts."""

    def forward(self, x):
        y = self.linear(x).reshape(-1, D)
        labels = y.detach().argmax(dim=-1) % 4
        sums = torch.zeros(4, D).index_add_(0, labels, y)
        counts = torch.zeros(4).index_add_(0, labels, torch.ones(labels.shape[0]))
        return sums / counts.clamp(min=1)[:, None]


class Prints(Plain):
    """An honest graph break."""

    def forward(self, x):
        y = self.linear(x)
        torch._dynamo.graph_break()
        return torch.relu(y)


MODELS = (
    BooleanRows,
    BooleanAssignment,
    Nonzero,
    ToList,
    ItemBranch,
    TensorBranch,
    Bincount,
    SplitBySizes,
    LoopOverLayers,
    MaskedBranches,
    LoopOverNonzero,
    Unique,
    IndexAddByClass,
    Prints,
)


def shape_of_compilation(module, **how):
    """Graphs by their operators, reasons of breaks, and all that was seen in two runs."""
    fresh_dynamo()
    compiled = torch.compile(module, **how)
    seen = [observe(compiled, module, hidden_states(seed=seed), seed=seed) for seed in range(2)]
    operators = [[(node.op, str(node.target)) for node in gm.graph.nodes] for gm in graphs]
    return operators, dict(counters["graph_break"]), counters["stats"]["unique_graphs"], seen


@pytest.mark.parametrize("block", MODELS, ids=lambda block: block.__name__)
def test_graphs_and_breaks_are_those_of_the_inner_backend(block):
    case = Case(block.__name__, block)
    stock = shape_of_compilation(case.make(), backend="counting_eager")
    ours = shape_of_compilation(case.make(), backend="scatter_moe", options={"inner_backend": "counting_eager"})
    assert ours[:3] == stock[:3]
    for actual, expected in zip(ours[3], stock[3], strict=True):
        assert_same(actual, expected)
    assert rewritten() == 0
    assert counters["scatter_moe"]["rejected"] == 0


@pytest.mark.parametrize("block", MODELS, ids=lambda block: block.__name__)
def test_fullgraph_fails_where_stock_fails(block):
    case = Case(block.__name__, block)

    def outcome(compile_it):
        fresh_dynamo()
        module = case.make()
        try:
            return observe(compile_it(module), module, hidden_states())
        except Exception as error:  # noqa: BLE001  whatever stock raises, we raise
            return type(error), str(error).splitlines()[0]

    stock = outcome(lambda module: torch.compile(module, backend="counting_eager", fullgraph=True))
    ours = outcome(lambda module: compile_ours(module, inner="counting_eager", fullgraph=True))
    if isinstance(stock, tuple):
        assert ours == stock
    else:
        assert_same(ours, stock)
