"""Switch layers that list every expert's tokens first, then run all experts, then assign what they made."""

import torch
from torch import nn

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E


class FeedForward(nn.Module):
    """A ReLU MLP with dropout between its layers."""

    def __init__(self, p=0.1):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(D, FF), nn.Linear(FF, D)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.layer2(self.dropout(torch.relu(self.layer1(x))))


class SwitchLists(nn.Module):
    """What an auxiliary loss needs is returned for each token, too; subclasses replace a step."""

    def __init__(self, expert=FeedForward):
        super().__init__()
        self.n_experts = E
        self.experts = nn.ModuleList([expert() for _ in range(E)])
        self.switch = nn.Linear(D, E)

    def routes(self, probs):
        """The probability and the number of each token's expert."""
        return torch.max(probs, dim=-1)

    def scale(self, out, probs):
        return out * probs.view(-1, 1)

    def lists(self, routes):
        """The tokens of each expert."""
        return [torch.eq(routes, e).nonzero(as_tuple=True)[0] for e in range(self.n_experts)]

    def outputs(self, x, lists):
        return [self.experts[e](x[lists[e], :]) for e in range(self.n_experts)]

    def assign(self, out, lists, outputs):
        for e in range(self.n_experts):
            out[lists[e], :] = outputs[e]
        return out

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        probs = torch.softmax(self.switch(x), dim=-1)
        probs_max, routes = self.routes(probs)
        lists = self.lists(routes)
        out = x.new_zeros(x.shape)
        counts = x.new_tensor([len(lists[e]) for e in range(self.n_experts)])
        out = self.assign(out, lists, self.outputs(x, lists))
        out = self.scale(out, probs_max)
        return out.view(hidden_states.shape), counts.expand(len(x), -1), probs, probs_max[:, None].expand_as(probs)


class SwitchUnscaled(SwitchLists):
    """The factor is one, so that gradients reach the router."""

    def scale(self, out, probs):
        return out * (probs / probs.detach()).view(-1, 1)


class SwitchCopied(SwitchLists):
    """Rows are copied by index."""

    def assign(self, out, lists, outputs):
        for tokens, rows in zip(lists, outputs, strict=True):
            out = out.index_copy(0, tokens, rows)
        return out

    def outputs(self, x, lists):
        return [expert(x[tokens, ...]) for expert, tokens in zip(self.experts, lists, strict=True)]


CASES = (
    Case("switch_lists", lambda: SwitchLists(lambda: FeedForward(p=0.0)), top_k=1, activation="relu"),
    Case("switch_lists_eval", SwitchLists, top_k=1, activation="relu", train=False),
    Case("switch_lists_unscaled", SwitchUnscaled, top_k=1, activation="relu", train=False),
    Case("switch_lists_copied", SwitchCopied, top_k=1, activation="relu", train=False),
)
