"""Is every rule needed? Each is taken out in turn, and the near misses that name it must then fail.

    python -m tests.mutate_rules                              all rules; takes minutes
    python -m tests.mutate_rules grad_mode_is_constant ...    some
    python -m tests.mutate_rules --first                      one near miss a rule, the first that fails

Prints a table: for each rule the near misses that name it, and how many of them fail without it: `differs` from eager,
`rewritten` though only by luck the same, or `raises`. Exits with 1 if a rule can go without any of them failing. The
table in docs/invariants.md is that of `--first`.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

os.environ["SCATTER_MOE_RAISE_FAULTS"] = "1"

from fx_passes.rules import loop as loop_rules
from fx_passes.rules import verify
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.near_misses import NEAR_MISSES, NearMiss
from tests.zoo import hidden_states

Rule = Callable[..., None]
OUTCOMES = ("differs", "rewritten", "raises")


def main(names: list[str], *, first: bool = False) -> int:
    known = {rule.__name__: rule for rule in (*loop_rules.LOOP_RULES, *verify.RULES)}
    unknown = set(names) - known.keys()
    if unknown:
        raise SystemExit(f"no rules of these names: {', '.join(sorted(unknown))}")
    rules = [rule for name, rule in known.items() if name in names or not names]
    if first:
        found = [first_failure(rule) for rule in rules]
        for rule, failure in zip(rules, found, strict=True):
            print(f"| `{rule.__name__}` | {failure or 'nothing fails'} |")
        return int(None in found)
    rows = [row(rule, place, len(rules)) for place, rule in enumerate(rules, 1)]
    print_table(rows)
    return int(any(not sum(outcomes[kind] for kind in OUTCOMES) for _, outcomes in rows))


def row(rule: Rule, place: int, total: int) -> tuple[str, Counter[str]]:
    name, misses = rule.__name__, misses_of(rule)
    print(f"[{place}/{total}] {name}: {len(misses)} near misses", file=sys.stderr, flush=True)
    with without(rule):
        outcomes = Counter(outcome(miss) for miss in misses)
    return name, outcomes


def misses_of(rule: Rule) -> list[NearMiss]:
    """Those that must not be rewritten first."""
    misses = [miss for miss in NEAR_MISSES if rule.__name__ in (miss.rule, miss.at_first)]
    return sorted(misses, key=lambda miss: miss.may_rewrite)


def first_failure(rule: Rule) -> str | None:
    """The first near miss that fails without `rule`, and how."""
    print(rule.__name__, file=sys.stderr, flush=True)
    with without(rule):
        for miss in misses_of(rule):
            seen = outcome(miss)
            if seen in OUTCOMES:
                return f"`{miss.name}` {seen}"
    return None


@contextmanager
def without(rule: Rule) -> Iterator[None]:
    """Regions are verified by all rules but this one."""

    def others(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(other for other in rules if other is not rule)

    with (
        mock.patch.object(verify, "RULES", others(verify.RULES)),
        mock.patch.object(verify, "LOOP_RULES", others(verify.LOOP_RULES)),
    ):
        yield


def outcome(miss: NearMiss) -> str:
    """What happens to a near miss now; "passes" where it is still left alone, or rewritten to the same."""
    fresh_dynamo()
    eager, module = miss.make(), miss.make()
    compiled = compile_ours(module, inner="counting_eager")
    try:
        for seed in range(2):
            actual = observe(compiled, module, hidden_states(seed=seed), seed=seed)
            assert_same(actual, observe(eager, eager, hidden_states(seed=seed), seed=seed))
    except AssertionError:
        return "differs"
    except Exception:  # noqa: BLE001  (whatever it is, the rule kept it away)
        return "raises"
    return "rewritten" if rewritten() and not miss.may_rewrite else "passes"


def print_table(rows: list[tuple[str, Counter[str]]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(f"| {'rule':{width}} | near misses | {' | '.join(OUTCOMES)} |")
    print(f"|{'-' * (width + 2)}|{'---|' * (len(OUTCOMES) + 1)}")
    for name, outcomes in rows:
        counts = " | ".join(f"{outcomes[kind]:{len(kind)}}" for kind in OUTCOMES)
        print(f"| {name:{width}} | {outcomes.total():11} | {counts} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    sys.exit(main([name for name in arguments if name != "--first"], first="--first" in arguments))
