"""What the pass says about a graph: regions that it rewrote and candidates that it left alone."""

import linecache
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._dynamo.utils import counters

from fx_passes.region import Rejection

log = logging.getLogger("scatter_moe")

_TORCH = os.path.dirname(torch.__file__) + os.sep

GRADIENTS = "an expert without tokens gets a zero gradient where eager leaves None"
UNWRITTEN = "ids outside 0..E-1 give zeros where eager leaves their rows undefined"
RANGE = "ids outside 0..E-1 give zeros where one_hot raises"


@dataclass(frozen=True)
class RegionReport:
    """One rewritten region: where it stood, what it was, and what it became.

    `source` is the place in the user's code, as `path/file.py:12`, and `code` that line.
    """

    form: str
    module_path: str
    source: str
    code: str
    num_experts: int
    top_k: int
    activation: str
    op: str
    deviations: tuple[str, ...]


@dataclass
class Report:
    """Everything that was decided while a report was collected."""

    regions: list[RegionReport] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    graphs: int = 0


_collecting: ContextVar[Report | None] = ContextVar("scatter_moe_report", default=None)


@contextmanager
def collecting() -> Iterator[Report]:
    """Collects what the pass decides in this thread."""
    report = Report()
    token = _collecting.set(report)
    try:
        yield report
    finally:
        _collecting.reset(token)


def current_report() -> Report:
    """The report that is being collected, or one that nobody reads."""
    return _collecting.get() or Report()


def record_rejections(rejections: Iterable[Rejection], seen: set[Rejection]) -> None:
    """Counts and reports each candidate once, however often its frame is traced: `seen` holds those that were."""
    for rejection in rejections:
        if rejection not in seen:
            seen.add(rejection)
            counters["scatter_moe"]["rejected"] += 1
            current_report().rejections.append(rejection)
            log.info("left as it is: %s", rejection)


def source_of(node: fx.Node | None) -> tuple[str, str]:
    """The place in the user's code that `node` stems from, as `path/file.py:12`, and the line there.

    Dynamo gives no place to nodes that switch a mode: theirs is that of the next node.
    """
    while node is not None and node.op not in ("root", "output") and not node.meta.get("stack_trace"):
        node = node.next
    trace = node.meta.get("stack_trace") if node is not None else None
    return innermost_source((name, int(line)) for name, line in re.findall(r'File "([^"]+)", line (\d+)', trace or ""))


def innermost_source(places: Iterable[tuple[str, int]]) -> tuple[str, str]:
    """The innermost of the places, outermost first, that is not in PyTorch itself (a layer's forward, say)."""
    places = list(places)
    own = [place for place in places if not place[0].startswith(_TORCH)] or places
    return source_line(*own[-1]) if own else ("unknown source", "")


def source_line(filename: str, line: int) -> tuple[str, str]:
    return f"{filename}:{line}", linecache.getline(filename, line).strip()


def module_path_of(node: fx.Node | None) -> str:
    """Path of the module whose forward made `node`, as `model.layers.0.mlp`."""
    stack = node.meta.get("nn_module_stack") if node is not None else None
    if not stack:
        return ""
    path = re.sub(r"\.?_?(modules|_modules)\[['\"]?(\w+)['\"]?\]", r".\2", str(list(stack.values())[-1][0]))
    # The model is `self` of a forward, or an argument of Dynamo's wrapper around a module such as nn.Sequential.
    return re.sub(r"^L\['\w+'\]", "", path).lstrip(".") or "(root)"
