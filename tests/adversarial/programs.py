"""Programs composed of a loop style, a router, a body, an addition and mutations, as Python source.

A mutation adds one line, at one of the places that the template below names; the lines need not make sense. One in the
caller makes the loop a method of its own. T tokens, K experts per token, E experts, D model width, F expert width.
"""

from dataclasses import dataclass
from functools import reduce

PREAMBLE = """\
import itertools
import random

import torch
from torch import nn
from torch.nn import functional as F

from tests.adversarial.model import E, FF, K, Model, counting, innermost, nested


class Program(Model):
"""

FORWARD = """\
    def forward(self, hidden_states):
        x = hidden_states * 1
"""

CALLER = """\
    def forward(self, hidden_states):
        x = hidden_states * 1
        result = self.moe(hidden_states, x)
{}
        return result, x

    def moe(self, hidden_states, x):
"""

ROUTERS = {
    "softmax": "w, ids = torch.topk(logits.softmax(-1), K, dim=-1)",
    "normalized": "w, ids = torch.topk(logits.softmax(-1), K, dim=-1); w = w / w.sum(-1, keepdim=True)",
    "sigmoid": "s = logits.sigmoid(); ids = torch.topk(s, K, dim=-1)[1]; w = s.gather(1, ids)",
    "sorted": "w, ids = logits.softmax(-1).sort(-1, descending=True); w, ids = w[:, :K], ids[:, :K]",
    "top_1": "w, ids = torch.topk(logits.softmax(-1), 1, dim=-1)",
}

MASK = "mask = F.one_hot(ids, E).permute(2, 1, 0)"
HITS = "for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():\n    e = e[0]"
WHERE = "k, t = torch.where(mask[e]); at = t"

WEIGHT = "y = y * w[t, k, None]"
SHARE = "(w * (ids == e)).sum(-1)"
ORDER = "order = ids.flatten().argsort(); at = order // ids.shape[1]"
SORTED = f"""\
{ORDER}
pieces, parts = x[at].split(ids.flatten().bincount(minlength=E).tolist()), []"""
SLICED = f"""\
{ORDER}
sorted_x, ends, parts = x[at], ids.flatten().bincount(minlength=E).cumsum(0).tolist(), []"""

SEQUENCE = """\
x3, ids3, w3 = x[None], ids.view(1, *ids.shape), w[None]
out3 = torch.zeros_like(x3)"""


@dataclass(frozen=True)
class Loop:
    """The loop's head, how it selects, names and weights an expert's rows, and what it does if it doesn't add them."""

    head: str
    select: str
    rows: str = "x[t]"
    weight: str = WEIGHT
    addition: str = ""
    after: str = ""


LOOPS = {
    "range": Loop("for e in range(E):", WHERE),
    "compared": Loop("for e in range(E):", "t, k = torch.where(ids == e); at = t"),
    "guarded": Loop("for e in range(E):", f"{WHERE}\nif t.numel() == 0:\n    continue"),
    "any": Loop("for e in range(E):", f"if not mask[e].any():\n    continue\n{WHERE}"),
    "enumerated": Loop("for e, expert in enumerate(self.experts):", WHERE),
    "hits": Loop(HITS, WHERE),
    "listed": Loop("for e in range(E):", f"{WHERE}\nt, at = t.tolist(), t"),
    "any_choice": Loop(
        "for e in range(E):",
        "t = (ids == e).any(-1); at = t.nonzero().squeeze(-1)",
        weight=f"y = y * {SHARE}[t, None]",
    ),
    "slots": Loop(
        "for k in range(ids.shape[1]):\n  for e in range(E):", "at = t = (ids[:, k] == e).nonzero().squeeze(-1)"
    ),
    "rounds": Loop("for _ in range(E):\n  for e in range(E):", WHERE),
    "rounds_of_hits": Loop(f"for _ in range(E):\n  {HITS}", WHERE),
    "rows_of_all": Loop("for e in range(E):\n  for other in range(E):", WHERE),
    "generated": Loop("for e in (number for number in range(E)):", WHERE),
    "zipped": Loop(
        "for e, (expert, chosen) in enumerate(zip(self.experts, mask)):", "k, t = torch.where(chosen); at = t"
    ),
    "dense": Loop(
        "for e in range(E):",
        "t = slice(None)",
        rows="x",
        weight=f"y = y * {SHARE}[:, None]",
        addition="out = out + y",
    ),
    "segments": Loop(
        f"{SORTED}\nfor e in range(E):",
        "t = slice(None)",
        rows="pieces[e]",
        weight="",
        addition="parts.append(y)",
        after="out = out.index_add(0, at, torch.cat(parts) * w.flatten()[order, None])",
    ),
    "slices": Loop(
        f"{SLICED}\nfor e in range(E):",
        "begin = ends[e - 1] if e else 0\nif begin == ends[e]:\n    continue\nt = slice(begin, ends[e])",
        rows="sorted_x[t]",
        weight="",
        addition="parts.append(y)",
        after="out = out.index_add(0, at, torch.cat(parts) * w.flatten()[order, None])",
    ),
    "unique": Loop("for e in ids.unique().tolist():", WHERE),
    "while": Loop("e = -1\nwhile e < E - 1:", f"e += 1\n{WHERE}"),
    "stacked": Loop(
        "parts = []\nfor e in range(E):",
        "t = slice(None)",
        rows="x",
        weight="",
        addition="parts.append(y)",
        after="out = (torch.stack(parts, 1)[torch.arange(len(x))[:, None], ids] * w[..., None]).sum(1)",
    ),
    "where": Loop(
        "for e in range(E):",
        "t = slice(None)",
        rows="x",
        weight=f"y = y * {SHARE}[:, None]",
        addition="out = out + torch.where((ids == e).any(-1)[:, None], y, 0.0)",
    ),
    "sequence": Loop(
        f"{SEQUENCE}\nfor e in range(E):",
        "b, t, k = torch.where(ids3 == e)",
        rows="x3[b, t]",
        weight="y = y * w3[b, t, k, None]",
        addition="out3.index_put_((b, t), y, accumulate=True)",
        after="out = out3[0]",
    ),
    "sequence_masked": Loop(
        f"{SEQUENCE}\nfor e in range(E):",
        "t = (ids3 == e).any(-1)",
        rows="x3[t]",
        weight="y = y * (w3 * (ids3 == e)).sum(-1)[t][:, None]",
        addition="out3[t] += y",
        after="out = out3[0]",
    ),
    "flat": Loop(
        "slots = torch.zeros_like(rows)\nfor e in range(E):",
        "s = (flat == e).nonzero().squeeze(-1); at = t = s // ids.shape[1]",
        rows="rows[s]",
        weight="y = y * flat_w[s, None]",
        addition="slots[s] = y",
        after="out = slots.view(*ids.shape, -1).sum(1)",
    ),
}

BODIES = {
    "modules": "y = self.experts[e](x[t])",
    "matmuls": "y = F.silu(x[t] @ self.up[e]) @ self.down[e]",
    "halves": "y = F.silu(x[t] @ self.gate_up[e][:, :FF]) @ self.down[e]",
    "chunks": "p, q = self.gate_up[e].chunk(2, -1); y = (F.silu(x[t] @ p) * (x[t] @ q)) @ self.down[e]",
    "gated": "g, u = (x[t] @ self.gate_up[e]).chunk(2, -1); y = (F.silu(g) * u) @ self.down[e]",
    "biased": "y = F.linear(F.gelu(x[t] @ self.up[e] + self.up_bias[e]), self.down[e].t(), self.down_bias[e])",
    "normed": "y = F.layer_norm(x[t] @ self.square[e], (4,))",
    "one_gate": "y = (F.silu(x[t] @ self.column[e]) * (x[t] @ self.up[e])) @ self.down[e]",
    "one_bias": "y = F.silu(x[t] @ self.up[e] + self.scale[e, None]) @ self.down[e]",
    "scaled": "y = (x[t] @ self.square[e]) * self.scale[e]",
}

ADDITIONS = {
    "in_place": "out.index_add_(0, at, y)",
    "functional": "out = out.index_add(0, at, y)",
    "plus_equals": "out[t] += y",
    "assigned": "out[t] = y",
}


def additions_of(loop: str) -> list[str]:
    """Those that make different programs around this loop."""
    return ["in_place"] if LOOPS[loop].addition else sorted(ADDITIONS)


# Where the line goes, and the line. Of "rows" it is what an expert gets for its rows, which are in place of {}.
MUTATIONS = {
    "rows_and_output": ("rows", "({} + out[t])"),
    "rows_less_output": ("rows", "({} - 0.5 * out.detach()[t])"),
    "rows_weighted": ("rows", "({} * w[t, k, None])"),
    "rows_flipped": ("rows", "{}.flip(0)"),
    "rows_detached": ("rows", "{}.detach()"),
    "rows_rolled": ("rows", "{}.roll(1, 0)"),
    "rows_of_shared": ("rows", "({} @ self.square[0])"),
    "constant": ("body", "y = y * (2.0 if e == 1 else 1.0)"),
    "tied_to_first": ("body", "y = y @ self.square[0 if e == 1 else e]"),
    "neighbour": ("body", "y = y @ self.square[(e + 1) % E]"),
    "shared": ("body", "y = y @ self.square[0]"),
    "reads_output": ("body", "y = y + out[t]"),
    "drawn": ("body", "y = y * random.random()"),
    "number": ("body", "y = y * (e + 1)"),
    "mean": ("body", "y = y - y.mean(0)"),
    "flip": ("body", "y = y.flip(0)"),
    "softmax_over_rows": ("body", "y = y.softmax(0)"),
    "count": ("body", "y = y / y.shape[0]"),
    "row_norm": ("body", "y = F.normalize(y, dim=-1)"),
    "dropout": ("body", "y = F.dropout(y, 0.5)"),
    "dead_dropout": ("body", "F.dropout(y, 0.5)"),
    "detach": ("body", "y = y.detach()"),
    "no_grad": ("body", "with torch.no_grad():\n    y = y * 2"),
    "autocast": ("body", "with torch.autocast('cpu', torch.bfloat16):\n    y = (y @ self.square[e]).float()"),
    "in_place_rows": ("body", "y.mul_(2.0)"),
    "cut_off": ("body", "y = (4 * y).to(torch.int32).float() + 0 * y"),
    "weighted_by_rounded": ("body", "y = y * w[t, k, None].half().float()"),
    "output_cast": ("body", "out = out.to(y.dtype)"),
    "output_widened": ("body", "out, y = out.double(), y.double()"),
    "relu_in_place": ("body", "F.relu(y, True)"),
    "unweighted": ("body", "y = y * w[t, k, None]"),
    "other_weights": ("body", "y = y * w[t, 0, None]"),
    "table": ("body", "y = y * logits[t, e, None]"),
    "keep": ("body", "y = y * (x > 0)[t]"),
    "number_is": ("body", "one = 1; y = y * 2 if e is one else y"),
    "row_of_row": ("body", "y = y + self.square[e][e]"),
    "next_number": ("body", "y = y * next(numbers)"),
    "asserts": ("body", "torch._check(y.shape[0] < 100)"),
    "ask_list": ("body", "y = y * 2 if isinstance(t, list) else y"),
    "skip": ("begin", "if e == 2:\n    continue"),
    "break": ("begin", "if e == 2:\n    break"),
    "break_late": ("end", "if e == 1:\n    break"),
    "return": ("end", "if e == 1:\n    return out"),
    "leak": ("end", "seen.append(y)"),
    "last": ("end", "last = y.sum()"),
    "last_number": ("end", "last = e"),
    "tokens": ("end", "last = len(t)"),
    "counter": ("end", "self.count += 1"),
    "iterator": ("end", "last = next(numbers)"),
    "deep": ("end", "innermost(deep).append(1)"),
    "attribute": ("end", "self.kept = x[t]"),
    "buffer": ("end", "self.served[e] += 1"),
    "buffer_in_place": ("end", "self.total.add_(1)"),
    "reads_buffer": ("body", "y = y * self.total"),
    "input_in_place": ("end", "x.detach().mul_(0.5)"),
    "weights_in_place": ("end", "w.detach().mul_(0.5)"),
    "mask_in_place": ("end", "mask[0].fill_(0)"),
    "decay": ("end", "out = out * 0.5"),
    "ids_clamped": ("routed", "ids = ids.clamp(max=1)"),
    "ids_modulo": ("routed", "ids = (ids + 1) % E"),
    "ids_repeated": ("routed", "ids = ids[:, :1].expand_as(ids)"),
    "ids_in_place": ("routed", "ids = ids.clone(); ids[:, -1] = ids[:, 0]"),
    "ids_copied": ("routed", "ids = ids.detach().clone(); ids[:, -1] = ids[:, 0]; ids = ids.clone()"),
    "threshold": ("masked", "mask = mask * (w.t() > 0.3)"),
    "other_input": ("masked", "x = x.flip(0)"),
    "ones": ("masked", "out = torch.ones_like(x)"),
    "alias": ("masked", "out = x"),
    "strided": ("masked", "out = torch.zeros_like(x.t().contiguous().t())"),
    "halves": ("masked", "last = out[:, :2]"),
    "written_before": ("masked", "out[:, 0] = 1"),
    "added_before": ("masked", "out.add_(0.5)"),
    "first_written": ("end", "out[0] = 2.0"),
    "begun_generator": ("masked", "numbers = counting(); next(numbers)"),
    "flat_ids_written": ("masked", "flat.clamp_(max=1)"),
    "flat_weights_unrecorded": ("masked", "with torch.no_grad():\n    flat_w = w.reshape(-1)"),
    "flat_weights_inferred": ("masked", "with torch.inference_mode():\n    flat_w = w.reshape(-1)"),
    "flat_weights_written": ("masked", "flat_w.mul_(2)"),
    "rows_written": ("masked", "rows.mul_(2)"),
    "last_number_is": ("after", "two = 2; out = out * 2 if e is two else out"),
    "written_after": ("after", "x.add_(1); last = x"),
    "number_after": ("after", "last = e"),
    "last_again": (
        "after",
        "k, t = torch.where(mask.roll(1, 0)[e]); out = out, torch.zeros_like(x).index_add(0, t, x[t])",
    ),
    "else": ("after", "out = out * (1.0 + len(seen))"),
    "called": ("caller", "x = x.sum()"),
    "caller_writes_rows": ("caller", "x.add_(1)"),
    "caller_writes_weight": ("caller", "self.up.detach().mul_(0.5)"),
    "caller_writes_biases": (
        "caller",
        "for bias in (self.up_bias, *(each.up.bias for each in self.experts)):\n    bias.detach().mul_(0.5)",
    ),
    "caller_writes_router": ("caller", "self.router.weight.detach().mul_(0.5)"),
}

# What a mutation needs before the loop. Not in every program: beside containers this deep most loops are left alone.
NEEDED = {"deep": "deep = nested(12)"}


@dataclass(frozen=True)
class Program:
    router: str
    loop: str
    body: str
    addition: str
    mutations: tuple[str, ...]

    def source(self) -> str:
        loop = LOOPS[self.loop]
        rows = reduce(lambda rows, line: line.format(rows), self._at("rows"), loop.rows)
        in_loop = [
            *self._at("begin"),
            loop.select,
            BODIES[self.body].replace("x[t]", rows),
            *self._at("body"),
            loop.weight,
            loop.addition or ADDITIONS[self.addition],
            *self._at("end"),
        ]
        lines = [
            "logits = self.router(hidden_states)",
            ROUTERS[self.router],
            *self._at("routed"),
            MASK,
            "out = torch.zeros_like(x)",
            "seen, last, numbers, deep = [], 0.0, itertools.count(), []",
            "flat, flat_w, rows = ids.reshape(-1), w.reshape(-1), x.repeat_interleave(ids.shape[1], 0)",
            *(NEEDED[mutation] for mutation in self.mutations if mutation in NEEDED),
            *self._at("masked"),
            loop.head,
            *(indented(line, 4) for line in in_loop if line),
            loop.after,
            *self._at("after"),
            "return out, last, seen, deep",
        ]
        in_caller = "\n".join(indented(line, 8) for line in self._at("caller"))
        head = CALLER.format(in_caller) if in_caller else FORWARD
        return PREAMBLE + head + "\n".join(indented(line, 8) for line in lines) + "\n"

    def _at(self, place: str) -> list[str]:
        return [line for where, line in map(MUTATIONS.__getitem__, self.mutations) if where == place]


def indented(lines: str, by: int) -> str:
    return "\n".join(" " * by + line for line in lines.split("\n"))
