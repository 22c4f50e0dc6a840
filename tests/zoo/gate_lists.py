"""Noisy top-k gating: gates [T, E], zero outside the top-k, and a dispatcher that lists those that are not zero."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K


class Expert(nn.Module):
    """A ReLU MLP."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class SoftmaxExpert(Expert):
    """Gives probabilities, which are added up outside of log space."""

    def forward(self, x):
        return torch.softmax(super().forward(x), 1)


class Dispatcher:
    """Sorts the tokens by expert, once for each expert with a gate that is not zero."""

    def __init__(self, gates):
        self.gates = gates
        experts, places = torch.nonzero(gates).sort(0)
        _, self.experts = experts.split(1, dim=1)
        self.tokens = torch.nonzero(gates)[places[:, 1], 0]
        self.sizes = self.counts(gates).tolist()
        self.weights = torch.gather(gates[self.tokens.flatten()], 1, self.experts)

    def counts(self, gates):
        return (gates > 0).sum(0)

    def dispatch(self, x):
        return torch.split(x[self.tokens].squeeze(1), self.sizes, dim=0)

    def expert_gates(self):
        return torch.split(self.weights, self.sizes, dim=0)

    def combine(self, outputs):
        rows = torch.cat(outputs, 0).mul(self.weights)
        shape, device = (self.gates.size(0), outputs[-1].size(1)), rows.device
        zeros = torch.zeros(shape, requires_grad=True, dtype=torch.float32, device=device)
        return zeros.index_add(0, self.tokens, rows.float())


class LogDispatcher(Dispatcher):
    """Adds up probabilities and goes back to log space; what is exactly zero is lifted."""

    def combine(self, outputs):
        total = super().combine([rows.exp() for rows in outputs])
        total[total == 0] = torch.finfo(torch.float64).eps
        return total.log()


class PlainDispatcher(Dispatcher):
    """The experts as a column, sizes of what isn't zero, rows put together without gates."""

    def __init__(self, gates):
        pairs = gates.nonzero()
        self.gates = gates
        experts, places = torch.sort(pairs, dim=0)
        self.experts = experts[:, 1]
        self.tokens = pairs[places[:, 1], 0]
        self.sizes = (gates != 0).sum(dim=0).tolist()

    def combine(self, outputs):
        rows = torch.cat(outputs)
        return rows.new_zeros(self.gates.size(0), rows.size(1)).index_add(0, self.tokens, rows)


class NoisyTopK(nn.Module):
    """Gates are a softmax over the K largest logits, which are noisy in training."""

    noisy = False
    dispatcher = Dispatcher

    def __init__(self, expert=Expert):
        super().__init__()
        self.experts = nn.ModuleList([expert() for _ in range(E)])
        self.gate_clean = nn.Parameter(torch.zeros(D, E))
        self.gate_noise = nn.Parameter(torch.zeros(D, E))

    def logits(self, x):
        clean = x @ self.gate_clean
        if not self.noisy or not self.training:
            return clean
        return clean + torch.randn_like(clean) * (F.softplus(x @ self.gate_noise) + 1e-2)

    def top_gates(self, logits):
        top, ids = logits.topk(K + 1, dim=1)
        return torch.softmax(top[:, :K], 1), ids[:, :K]

    def gates(self, x):
        logits = self.logits(x)
        top, ids = self.top_gates(logits)
        return torch.zeros_like(logits, requires_grad=True).scatter(1, ids, top)

    def loss(self, gates):
        """How unevenly the experts are used, by gates and by tokens; the same for each gate."""
        by_gates, by_tokens = (use.float().std() / use.float().mean() for use in (gates.sum(0), (gates > 0).sum(0)))
        return (by_gates + by_tokens).expand_as(gates)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        gates = self.gates(x)
        loss = self.loss(gates)
        dispatcher = self.dispatcher(gates)
        inputs = dispatcher.dispatch(x)
        outputs = [self.experts[e](inputs[e]) for e in range(E)]
        out = dispatcher.combine(outputs).view(hidden_states.shape)
        return out.to(x.dtype), loss


class Noisy(NoisyTopK):
    noisy = True


class SoftmaxFirst(NoisyTopK):
    """Probabilities of all experts, of which the K largest are scaled to a sum of nearly one."""

    def top_gates(self, logits):
        top, ids = torch.softmax(logits, 1).topk(K, dim=1)
        return top / (top.sum(1, keepdim=True) + 1e-6), ids


class LogSpace(NoisyTopK):
    dispatcher = LogDispatcher


class Plain(NoisyTopK):
    dispatcher = PlainDispatcher


class ClosedGates(NoisyTopK):
    """ReLU closes some of the chosen gates: those slots are dropped."""

    def top_gates(self, logits):
        top, ids = logits.topk(K, dim=1)
        return torch.relu(top - 0.5), ids


CASES = (
    Case("gate_lists", NoisyTopK, activation="relu"),
    Case("gate_lists_noisy", Noisy, activation="relu", random=True),
    Case("gate_lists_softmax_first", SoftmaxFirst, activation="relu"),
    Case("gate_lists_log_space", lambda: LogSpace(SoftmaxExpert), op="parallel_linear"),
    Case("gate_lists_plain", Plain, activation="relu"),
    Case("gate_lists_closed", ClosedGates, activation="relu"),
)
