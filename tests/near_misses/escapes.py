"""What is computed in a loop and seen after it."""

import torch

from tests.near_misses.common import Loop, NearMiss, hits


class LastOutput(Loop):
    """The last expert's output is returned as well."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        y = x
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out, y


class LastOutputHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        y = x
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out, y


class Counts(Loop):
    """Tokens per expert, as Python integers."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        counts = []
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            counts.append(tokens.shape[0])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out, counts


class CountsHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        counts = []
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            counts.append(len(tokens))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out, counts


class Listed(Loop):
    """Every expert's output in a list that lives on the module."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens])
            self.outputs.append(y.detach())
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class ListedHit(Listed):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            y = self.experts[e](x[tokens])
            self.outputs.append(y.detach())
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class Visits(Loop):
    """A Python counter on the block: E per call in a range loop."""

    visits = 0

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            self.visits += 1
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class VisitsHit(Loop):
    """Only experts with tokens are counted."""

    visits = 0

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            self.visits += 1
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class Usage(Loop):
    """Tokens per expert in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("usage", torch.zeros(self.num_experts))

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            self.usage[e] += tokens.shape[0]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class UsageHit(Usage):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            self.usage[e] += tokens.shape[0]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class UsageFromMask(Usage):
    """The same counts taken before the loop: no business of the region."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        self.usage += mask.sum(dim=(1, 2))
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class UsageFromMaskHit(Usage):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        self.usage += mask.sum(dim=(1, 2))
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class VariableAfter(Loop):
    """The loop variable survives a range loop as E - 1."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * e


class VariableAfterHit(Loop):
    """The last hit expert's number survives."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        e = torch.zeros(1)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * e


class TokensAfter(Loop):
    """The last expert's tokens are marked after the loop."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        tokens = torch.zeros(0, dtype=torch.long)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.index_fill(0, tokens, 0.5)


class TokensAfterHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        tokens = torch.zeros(0, dtype=torch.long)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out.index_fill(0, tokens, 0.5)


class AuxiliaryLoss(Loop):
    """A penalty summed inside the loop."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        penalty = x.new_zeros(())
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens])
            penalty = penalty + y.pow(2).sum()
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out, penalty


class AuxiliaryLossHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        penalty = x.new_zeros(())
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            y = self.experts[e](x[tokens])
            penalty = penalty + y.pow(2).sum()
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out, penalty


class KeepsLogits(Loop):
    """Writes an attribute outside the loop."""

    logits = None

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        self.logits = self.gate(x).detach()
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class KeepsState(Loop):
    """Keeps the last expert's input."""

    state = None

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            state = x[tokens]
            self.state = state.detach()
            out.index_add_(0, tokens, self.experts[e](state) * weights[tokens, slots, None])
        return out


class SharedCounter(Loop):
    """A dictionary outside the module is written."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            self.seen[int(e)] = self.seen.get(int(e), 0) + 1
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


MISSES = (
    NearMiss("range_last_output", "no_intermediate_escapes", LastOutput),
    NearMiss("hit_last_output", "no_intermediate_escapes", LastOutputHit),
    NearMiss("range_counts", "no_intermediate_escapes", Counts),
    NearMiss("hit_counts", "no_intermediate_escapes", CountsHit),
    NearMiss("range_listed", "no_intermediate_escapes", Listed),
    NearMiss("hit_listed", "loop_changes_no_python_state", ListedHit),
    NearMiss("range_visits", "loop_changes_no_python_state", Visits, may_rewrite=True),
    NearMiss("hit_visits", "loop_changes_no_python_state", VisitsHit),
    NearMiss("range_usage", "no_intermediate_escapes", Usage, may_rewrite=True),
    NearMiss("hit_usage", "no_intermediate_escapes", UsageHit),
    NearMiss("range_usage_from_mask", "no_intermediate_escapes", UsageFromMask, may_rewrite=True),
    NearMiss("hit_usage_from_mask", "loop_changes_no_python_state", UsageFromMaskHit, may_rewrite=True),
    NearMiss("range_variable_after", "no_intermediate_escapes", VariableAfter, may_rewrite=True),
    NearMiss("hit_variable_after", "no_intermediate_escapes", VariableAfterHit),
    NearMiss("range_tokens_after", "no_intermediate_escapes", TokensAfter),
    NearMiss("hit_tokens_after", "no_intermediate_escapes", TokensAfterHit),
    NearMiss("range_auxiliary_loss", "no_intermediate_escapes", AuxiliaryLoss),
    NearMiss("hit_auxiliary_loss", "no_intermediate_escapes", AuxiliaryLossHit),
    NearMiss("hit_keeps_logits", "loop_has_a_known_form", KeepsLogits, may_rewrite=True),
    NearMiss("hit_keeps_state", "loop_changes_no_python_state", KeepsState),
    NearMiss("hit_shared_counter", "loop_changes_no_python_state", SharedCounter),
)
