"""Runs one program as it is and under our backend, and says what became of it."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from tests.adversarial.model import D
from tests.adversarial.programs import ADDITIONS, BODIES, LOOPS, MUTATIONS, ROUTERS, Program, additions_of
from tests.backend.harness import Seen, assert_equal_value, assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.numerics import TOLERANCE

FAILED = "failed"
REWRITTEN = "rewritten"
LEFT_ALONE = "left alone"
NOT_RUNNING = "not run: fails in eager"
STOCK_WRONG = "left out: PyTorch alone is wrong or fails"
OUTCOMES = (REWRITTEN, LEFT_ALONE, NOT_RUNNING, STOCK_WRONG, FAILED)

PROGRAMS = st.builds(
    Program,
    *(st.sampled_from(sorted(table)) for table in (ROUTERS, LOOPS, BODIES, ADDITIONS)),
    st.lists(st.sampled_from(sorted(MUTATIONS)), max_size=2, unique=True).map(tuple),
)

Sight = list[tuple[Seen, torch.Tensor]]
VANISHED = 1e-9  # a gradient that is nowhere larger in float64 is zero: inputs and weights are about 1


@dataclass(frozen=True)
class Verdict:
    """`detail` is empty unless it failed."""

    program: Program
    outcome: str
    detail: str = ""


def draw(count: int, drawn_by: int) -> list[Program]:
    """The same programs for the same seed, each once."""
    programs: dict[Program, None] = {}

    @seed(drawn_by)
    @settings(
        max_examples=2 * count + 100,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(PROGRAMS)
    def collect(program: Program) -> None:
        programs[program] = None

    collect()
    return list(programs)[:count]


def each_mutation(drawn_by: int) -> list[Program]:
    """Every loop and addition with every mutation alone; routers and bodies are drawn, the same for the same seed."""
    draws = Random(drawn_by)
    return [
        Program(draws.choice(sorted(ROUTERS)), loop, draws.choice(sorted(BODIES)), addition, (mutation,))
        for loop in LOOPS
        for addition in additions_of(loop)
        for mutation in MUTATIONS
    ]


def check(program: Program, directory: Path) -> Verdict:
    """Two steps in eager and two under our backend, in a file of its own in `directory`."""
    made = load(program.source(), directory)
    try:
        eager = run(made, lambda module: module)
    except Exception:  # noqa: BLE001  (a mutation may make a program that doesn't run)
        return Verdict(program, NOT_RUNNING)
    fresh_dynamo()
    try:
        ours = run(made, lambda module: compile_ours(module, inner="counting_eager"))
        outcome = REWRITTEN if rewritten() else LEFT_ALONE
        assert_all_same_where_exact(ours, eager, made)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is told)
        if is_stocks_fault(made, eager):
            return Verdict(program, STOCK_WRONG)
        return Verdict(program, FAILED, f"{type(error).__name__}: {error}")
    return Verdict(program, outcome)


_numbers = itertools.count()


def load(source: str, directory: Path) -> Callable[[], nn.Module]:
    path = directory / f"program_{next(_numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Program


def run(
    program: Callable[[], nn.Module], compiled: Callable[[nn.Module], Callable], dtype: torch.dtype = torch.float32
) -> Sight:
    """What two steps of a program show, and the random number that is drawn next."""
    torch.manual_seed(0)
    module = program().to(dtype)
    call = compiled(module)
    seen = []
    for step, tokens in enumerate((7, 4)):
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(step)).to(dtype).requires_grad_()
        seen.append((observe(call, module, x, seed=step), torch.rand(())))
    return seen


def assert_all_same(ours: Sight, eager: Sight) -> None:
    """A program may widen what its experts computed in float32."""
    for (our_sight, our_number), (sight, number) in zip(ours, eager, strict=True):
        assert_same(our_sight, sight, computed_in=torch.float32)
        assert_equal_value(our_number, number, "the next random number")


def assert_all_same_where_exact(ours: Sight, eager: Sight, program: Callable[[], nn.Module]) -> None:
    """As `assert_all_same`; a gradient that is zero but for rounding is measured by the largest of all gradients."""
    try:
        assert_all_same(ours, eager)
    except AssertionError:
        exact = run(program, lambda module: module, torch.float64)
        seen = [vanishing(*(sight for sight, _ in step)) for step in zip(ours, eager, exact, strict=True)]
        if not any(seen):
            raise
        assert_all_same(without(ours, seen), without(eager, seen))


def vanishing(ours: Seen, eager: Seen, exact: Seen) -> set[str]:
    """The gradients that are zero in float64, and in ours as far as float32 goes."""
    scale = TOLERANCE[torch.float32] * max(map(largest, eager.grads.values()))
    names = {name for name, grad in exact.grads.items() if grad is not None and largest(grad) < VANISHED}
    return {name for name in names if largest(ours.grads[name]) <= scale}


def largest(grad: torch.Tensor | None) -> float:
    return 0.0 if grad is None else grad.abs().max().item()


def without(sights: Sight, left_out: list[set[str]]) -> Sight:
    return [
        (replace(seen, grads={name: grad for name, grad in seen.grads.items() if name not in names}), number)
        for (seen, number), names in zip(sights, left_out, strict=True)
    ]


def is_stocks_fault(program: Callable[[], nn.Module], eager: Sight) -> bool:
    """Whether torch.compile without us differs from eager, too."""
    fresh_dynamo()
    try:
        assert_all_same(run(program, lambda module: torch.compile(module, backend="eager")), eager)
    except Exception:  # noqa: BLE001  (whatever it is, it isn't ours)
        return True
    return False
