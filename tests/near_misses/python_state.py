"""Python values and tensors that one iteration hands to the next."""

import itertools
from collections import Counter, OrderedDict, defaultdict
from functools import partial

import torch

from tests.near_misses.common import NearMiss, RangeLoop, StackedLoop
from tests.zoo.common import D

STEPS = {"count": 0}
LAST = torch.zeros(())


class Enumerated(StackedLoop):
    """The position among the hits scales the output."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for i, e in enumerate(hit):
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * (1 + i) * weights[tokens, slots, None])
        return out


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


class FirstIsSpecial(StackedLoop):
    """A flag that the first iteration clears."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        first = True
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = self.expert(x[tokens], e)
            if first:
                y, first = y * 2, False
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class TensorFlag(StackedLoop):
    """A tensor factor that halves from iteration to iteration."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        factor = torch.ones(())
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * factor * weights[tokens, slots, None])
            factor = factor * 0.5
        return out


class PreviousRows(StackedLoop):
    """An expert adds the mean of the expert before."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        previous = torch.zeros(D)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = self.expert(x[tokens], e) + previous
            previous = y.mean(dim=0)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
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


class TokenTotal(StackedLoop):
    """The sizes are summed; the sum is known (T * K), the loop is not the place to see it."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        total = 0
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            total = total + tokens.shape[0]
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * total


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


class LastHit(RangeLoop):
    """What the last expert with a token left in a local; `first` is there before the loop, or nothing is."""

    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        scaled = [x * 1, x * 2, x * 3, x * 4]
        if self.bound:
            last = x * 0
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() == 0:
                continue
            last = scaled[e]
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out + last


class GlobalTensor(RangeLoop):
    """A global is bound to a tensor of the last expert with a token."""

    def forward(self, hidden_states):
        global LAST
        x, weights, mask, out = self.start(hidden_states)
        scaled = [x.detach() * factor for factor in range(1, 5)]
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() == 0:
                continue
            LAST = scaled[e]
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out + LAST


class AsksTheList(RangeLoop):
    """`ask` is a question about the list of an expert's tokens, which only looks as if it were an index."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def value(self, x, weights, tokens, slots, e):
        listed = tokens.tolist()
        y = self.expert(x[listed], e) * weights[listed, slots, None]
        return y * 2 if self.ask(listed) else y


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


STATE, FORM = "loop_changes_no_python_state", "loop_has_a_known_form"

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

MISSES = (
    NearMiss("hit_enumerated", FORM, Enumerated),
    NearMiss("hit_counted_by_iterator", STATE, CountedByIterator),
    NearMiss("hit_list_iterator", STATE, ListIterator),
    NearMiss("hit_popped_list", STATE, PoppedList),
    NearMiss("hit_first_is_special", STATE, FirstIsSpecial),
    NearMiss("hit_tensor_factor", "carried_tensors_are_the_output", TensorFlag),
    NearMiss("hit_previous_rows", "carried_tensors_are_the_output", PreviousRows),
    NearMiss("hit_fresh_object", STATE, FreshObject),
    NearMiss("hit_nonlocal", STATE, Nonlocal),
    NearMiss("hit_global_dict", STATE, GlobalDict),
    NearMiss("hit_token_total", "no_intermediate_escapes", TokenTotal),
    *(NearMiss(f"range_{name}", STATE, partial(Remembers, *how)) for name, how in CONTAINERS.items()),
    *(NearMiss(f"hit_{name}", STATE, partial(RemembersInHits, *how)) for name, how in CONTAINERS.items()),
    NearMiss("range_ordered_on_module", STATE, OrderedOnModule),
    NearMiss("range_callers_iterator", STATE, CallersIterator),
    NearMiss("hit_default_argument", STATE, DefaultArgument),
    NearMiss("range_last_hit", STATE, partial(LastHit, bound=True)),
    NearMiss("range_last_hit_unbound", STATE, partial(LastHit, bound=False)),
    NearMiss("range_global_tensor", STATE, GlobalTensor),
    NearMiss(
        "range_list_is_list", None, partial(AsksTheList, lambda tokens: isinstance(tokens, list)), may_rewrite=True
    ),
    NearMiss("range_list_is_tensor", None, partial(AsksTheList, torch.is_tensor), may_rewrite=True),
    NearMiss("range_list_is_summed", "loop_can_be_traced", partial(AsksTheList, lambda tokens: sum(tokens) > 150)),
    NearMiss("range_list_is_truthy", "loop_can_be_traced", partial(AsksTheList, bool)),
)
