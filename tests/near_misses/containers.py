"""Containers and iterators that are changed for each expert with a token."""

import itertools
from collections import Counter, OrderedDict, defaultdict
from functools import partial

import torch

from tests.near_misses.common import NearMiss, RangeLoop, StackedLoop


class Remembers(RangeLoop):
    """A container that `make` makes is changed by `change` for each expert with a token, and scales the output.

    `change` and `factor` take the container and the expert.
    """

    def __init__(self, make, change, factor):
        super().__init__()
        self.make, self.change, self.factor = make, change, factor

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        container = self.make()
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() == 0:
                continue
            self.change(container, e)
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out * self.factor(container)


class RemembersInHits(StackedLoop):
    """The same in a hit loop, where the container scales each expert's result."""

    def __init__(self, make, change, factor):
        super().__init__()
        self.make, self.change, self.factor = make, change, factor

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        container = self.make()
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            self.change(container, 0)
            factor = self.factor(container)
            out.index_add_(0, tokens, self.expert(x[tokens], e) * factor * weights[tokens, slots, None])
        return out


class OrderedOnModule(RangeLoop):
    """Experts with a token are kept in an OrderedDict of the module."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        self.served = OrderedDict()
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() == 0:
                continue
            self.served[e] = 1
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out


class CallersIterator(RangeLoop):
    """An iterator of the caller's moves on in the frame that holds the loop."""

    def forward(self, hidden_states):
        numbers = itertools.count(1)

        def run():
            x, weights, mask, out = self.start(hidden_states)
            for e in range(self.num_experts):
                slots, tokens = torch.where(mask[e])
                if len(tokens) == 0:
                    continue
                next(numbers)
                out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
            return out

        return run() * next(numbers)


def add_one(counts, _):
    counts["a"] += 1


def counting():
    """A generator that has begun stands at the same place after each number."""
    number = 0
    while number < 100:
        yield number * 1.0
        number += 1


def begun():
    numbers = counting()
    next(numbers)
    return numbers


def nested(depth=12):
    """A list in a list in a list ..."""
    return [] if depth == 0 else [nested(depth - 1)]


def innermost(lists):
    while lists and lists[0] != 1:
        lists = lists[0]
    return lists


STATE = "loop_changes_no_python_state"

CONTAINERS = {
    "count": (itertools.count, lambda numbers, _: next(numbers), next),
    "range_iterator": (lambda: iter(range(1, 20)), lambda numbers, _: next(numbers), next),
    "generator": (lambda: (i * 1.0 for i in range(20)), lambda numbers, _: next(numbers), next),
    "begun_generator": (begun, lambda numbers, _: next(numbers), next),
    "deep_list": (nested, lambda lists, _: innermost(lists).append(1), lambda lists: len(innermost(lists))),
    "counter": (Counter, lambda counter, _: counter.update("a"), lambda counter: counter["a"]),
    "default_dict": (lambda: defaultdict(int), add_one, lambda counts: counts["a"]),
    "ordered_dict": (OrderedDict, lambda seen, e: seen.__setitem__((e, len(seen)), 1), len),
    "nested_set": (
        lambda: {"a": [set()]},
        lambda seen, e: seen["a"][0].add((e, len(seen["a"][0]))),
        lambda seen: len(seen["a"][0]),
    ),
}


class NumbersOfOneHash(RangeLoop):
    """Which of -1 and -2, two numbers of one hash, a set holds changes with each expert."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        held = {-1}
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
            held.add(-3 - held.pop())
        return out * (2 if -2 in held else 1)


class NumbersOfOneHashInHits(StackedLoop):
    """The same once there is any."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        held = {-1: 0}
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
            held.clear()
            held[-2] = 0
        return out * (2 if -2 in held else 1)


MISSES = (
    *(NearMiss(f"range_{name}", STATE, partial(Remembers, *how)) for name, how in CONTAINERS.items()),
    *(NearMiss(f"hit_{name}", STATE, partial(RemembersInHits, *how)) for name, how in CONTAINERS.items()),
    NearMiss("range_numbers_of_one_hash", None, NumbersOfOneHash, may_rewrite=True),
    NearMiss("hit_numbers_of_one_hash", STATE, NumbersOfOneHashInHits),
    NearMiss("range_ordered_on_module", STATE, OrderedOnModule),
    NearMiss("range_callers_iterator", STATE, CallersIterator),
)
