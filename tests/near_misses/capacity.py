"""A fixed number of places for each expert: recognised, and left as it is."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import FF, D, E, K

CAPACITY = 6


class Places(nn.Module):
    """Two products of all experts on their places [E, C, D]."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.empty(E, D, FF))
        self.down = nn.Parameter(torch.empty(E, FF, D))

    def experts(self, rows):
        return torch.bmm(F.gelu(torch.bmm(rows, self.up)), self.down)


class GShard(Places):
    """Dispatch and combine as einsums with a table [T, E, C]."""

    def tables(self, x):
        weights, ids = self.gate(x).softmax(dim=-1).topk(K, dim=-1)
        chosen = F.one_hot(ids, E).float()
        place = chosen.reshape(-1, E).cumsum(dim=0).reshape(chosen.shape) - 1
        places = F.one_hot(place.clamp(0, CAPACITY - 1).long(), CAPACITY) * (place < CAPACITY).unsqueeze(-1)
        combine = (weights[:, :, None, None] * chosen.unsqueeze(-1) * places).sum(dim=1)
        return (combine > 0).to(x.dtype), combine

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        dispatch, combine = self.tables(x)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        return torch.einsum("tec,ecd->td", combine, self.experts(rows)).view_as(hidden_states)


class Grouped(GShard):
    """The same for each sequence."""

    def forward(self, hidden_states):
        tables = [self.tables(x) for x in hidden_states]
        dispatch, combine = (torch.stack(table) for table in zip(*tables, strict=True))
        rows = torch.einsum("bnd,bnec->ebcd", hidden_states, dispatch)
        shape = rows.shape
        y = self.experts(rows.reshape(E, -1, D)).reshape(shape)
        return torch.einsum("ebcd,bnec->bnd", y, combine)


class ExpertChoice(Places):
    """Each expert takes the tokens that it scores highest."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        weights, tokens = self.gate(x).softmax(dim=-1).t().topk(CAPACITY, dim=-1)
        y = self.experts(x[tokens]) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens.reshape(-1), y.reshape(-1, D)).view_as(hidden_states)


class LinearAttention(nn.Module):
    """Einsums that sum over tokens, and over what they were summed into: no experts anywhere."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 4, D // 4)).unbind(dim=2)
        state = torch.einsum("bthc,bthd->bhcd", k.softmax(dim=1), v)
        return torch.einsum("bthc,bhcd->bthd", q, state).flatten(2)


MISSES = (
    NearMiss("capacity_gshard", "every_chosen_token_is_computed", GShard),
    NearMiss("capacity_grouped", "every_chosen_token_is_computed", Grouped),
    NearMiss("capacity_expert_choice", "tokens_choose_their_experts", ExpertChoice),
    NearMiss("capacity_linear_attention", None, LinearAttention),
)
