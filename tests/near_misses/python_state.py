"""Python variables that a loop changes, and lists that it asks questions."""

import itertools
from functools import partial

import torch

from tests.near_misses.common import NearMiss, RangeLoop, StackedLoop

STEPS = {"count": 0}


class CountedByIterator(StackedLoop):
    """next() of an iterator made before the loop."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        numbers = itertools.count(1)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * next(numbers) * weights[tokens, slots, None])
        return out


class ListIterator(StackedLoop):
    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        scales = iter([1.0, 2.0, 3.0, 4.0])
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * next(scales) * weights[tokens, slots, None])
        return out


class PoppedList(StackedLoop):
    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        scales = [1.0, 2.0, 3.0, 4.0]
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * scales.pop() * weights[tokens, slots, None])
        return out


class Box:
    """A fresh object with one attribute."""

    def __init__(self):
        self.value = 0


class FreshObject(StackedLoop):
    """The attribute of an object made before the loop counts iterations."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        box = Box()
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            box.value += 1
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * box.value


class Nonlocal(StackedLoop):
    """A closure's variable counts iterations."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        count = 0

        def tick():
            nonlocal count
            count += 1

        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            tick()
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * count


class GlobalDict(StackedLoop):
    """An entry of a module-level dictionary counts iterations; the result shows it."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        STEPS["count"] = 0
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            STEPS["count"] += 1
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * STEPS["count"]


def bump(acc=[0]):  # noqa: B006  (the default is the state)
    acc[0] += 1
    return acc[0]


class DefaultArgument(StackedLoop):
    """A mutable default argument counts iterations."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        bump.__defaults__[0][0] = 0
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None] * bump())
        return out


class AsksTheList(RangeLoop):
    """`ask` is a question about the list of an expert's tokens, which only looks as if it were an index."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def value(self, x, weights, tokens, slots, e):
        listed = tokens.tolist()
        y = self.expert(x[listed], e) * weights[listed, slots, None]
        return y * 2 if self.ask(listed) else y


STATE, TRACED = "loop_changes_no_python_state", "loop_can_be_traced"

MISSES = (
    NearMiss("hit_counted_by_iterator", STATE, CountedByIterator),
    NearMiss("hit_list_iterator", STATE, ListIterator),
    NearMiss("hit_popped_list", STATE, PoppedList),
    NearMiss("hit_fresh_object", STATE, FreshObject),
    NearMiss("hit_nonlocal", STATE, Nonlocal),
    NearMiss("hit_global_dict", STATE, GlobalDict),
    NearMiss("hit_default_argument", STATE, DefaultArgument),
    NearMiss(
        "range_list_is_list", None, partial(AsksTheList, lambda tokens: isinstance(tokens, list)), may_rewrite=True
    ),
    NearMiss("range_list_is_tensor", None, partial(AsksTheList, torch.is_tensor), may_rewrite=True),
    NearMiss("range_list_is_summed", TRACED, partial(AsksTheList, lambda tokens: sum(tokens) > 150)),
    NearMiss("range_list_is_truthy", TRACED, partial(AsksTheList, bool)),
)
