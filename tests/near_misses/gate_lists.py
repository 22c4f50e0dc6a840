"""Dispatchers of gates that are not zero: other gates, other rows, gates that change, zeros that others get to see."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.gate_lists import Dispatcher, NoisyTopK


class Threshold(NoisyTopK):
    """As many gates as are large enough: a token has any number of experts."""

    def gates(self, x):
        probs = torch.softmax(self.logits(x), 1)
        return torch.where(probs > 0.2, probs, 0.0)


class RepeatedIds(NoisyTopK):
    """Two choices of a token may be the same expert, whose gate is then that of one of them."""

    def top_gates(self, logits):
        top, ids = super().top_gates(logits)
        return top, ids // 2


class SignedGates(NoisyTopK):
    """Gates may be negative, which are listed but not counted: cutting the rows then fails."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(E))

    def top_gates(self, logits):
        top, ids = super().top_gates(logits)
        return top * self.scale[ids], ids


class NextTokens(Dispatcher):
    """Rows of the tokens as they are listed, not as they are sorted."""

    def __init__(self, gates):
        super().__init__(gates)
        self.tokens = torch.nonzero(gates)[:, 0]


class OtherExpert(Dispatcher):
    """Outputs times the gates of the next expert."""

    def __init__(self, gates):
        super().__init__(gates)
        self.weights = torch.gather(gates[self.tokens], 1, (self.experts + 1) % E)


class OtherTokens(Dispatcher):
    """Outputs times the gates of the tokens in their own order."""

    def __init__(self, gates):
        super().__init__(gates)
        self.weights = torch.gather(gates[self.tokens.sort().values], 1, self.experts)


class WrittenGates(Dispatcher):
    """The gates change once they are listed."""

    def __init__(self, gates):
        gates = gates.clone()
        super().__init__(gates)
        gates.fill_(1.0)
        self.weights = torch.gather(gates[self.tokens], 1, self.experts)


class ReturnedRows(NoisyTopK):
    """The tokens in the order of experts are returned, too."""

    def loss(self, gates):
        return super().loss(gates) + torch.nonzero(gates)[:, 0].sum()


class ReturnedZeros(NoisyTopK):
    """The zeros are returned, too: theirs is the gradient of all gates."""

    def gates(self, x):
        logits = self.logits(x)
        top, ids = self.top_gates(logits)
        self.zeros = torch.zeros_like(logits, requires_grad=True)
        return self.zeros.scatter(1, ids, top)

    def loss(self, gates):
        return super().loss(gates) + self.zeros


class Frozen(NoisyTopK):
    """Nothing but the zeros requires a gradient, so they make the output require one."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def forward(self, hidden_states):
        return super().forward(hidden_states.detach())


def dispatched(dispatcher):
    return type(dispatcher.__name__, (NoisyTopK,), {"dispatcher": dispatcher})


MISSES = (
    NearMiss("gate_lists_threshold", "loop_has_a_known_form", Threshold),
    NearMiss("gate_lists_repeated_ids", "loop_has_a_known_form", RepeatedIds),
    NearMiss("gate_lists_signed", "loop_has_a_known_form", SignedGates),
    NearMiss("gate_lists_unsorted_tokens", "loop_has_a_known_form", dispatched(NextTokens)),
    NearMiss("gate_lists_other_expert", "body_is_row_wise", dispatched(OtherExpert)),
    NearMiss("gate_lists_other_tokens", "body_is_row_wise", dispatched(OtherTokens)),
    NearMiss("gate_lists_written_gates", "loop_has_a_known_form", dispatched(WrittenGates)),
    NearMiss("gate_lists_returned_rows", "no_intermediate_escapes", ReturnedRows),
    NearMiss("gate_lists_returned_zeros", "loop_has_a_known_form", ReturnedZeros),
    NearMiss("gate_lists_frozen", "loop_has_a_known_form", Frozen),
)
