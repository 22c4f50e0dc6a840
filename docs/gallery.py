"""docs/gallery.md: the naive code of each golden graph on the left, the graph itself on the right."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

ROOT = Path(__file__).parent.parent
INTRODUCTION = """\
# Gallery

Left: the experts as somebody wrote them, from the zoo of naive programs (`tests/zoo`): a forward and the methods that
it leads to. Right: the graph that Inductor gets instead. The graphs are the goldens in `tests/forms/goldens`: a test
fails when one changes. Names that start with a dot are methods of tensors; `scatter_moe.*` are [operators](ops.md).
What stands before the first of them is the program's own router, untouched."""


def text() -> str:
    from tests.zoo import ZOO  # builds modules: only where the page is wanted

    cases = {case.name: case for case in ZOO}
    sections = [INTRODUCTION]
    for title, case, graph in goldens():
        naive = source_of_experts(cases[case].make())
        blocks = [f"<!-- not run: shown -->\n```python\n{code}\n```" for code in (naive, graph)]
        sections += [f"## {title}", '<div class="grid" markdown>', *blocks, "</div>"]
    return "\n\n".join(sections) + "\n"


def goldens() -> Iterator[tuple[str, str, str]]:
    """Title, name of the zoo's case and expected graph of each golden test."""
    files = sorted((ROOT / "tests" / "forms" / "goldens").glob("test_*.py"))
    for function in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            strings = [
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            case, graph = sorted(strings, key=len)
            yield function.name.removeprefix("test_").replace("_", " ").capitalize(), case, graph


def source_of_experts(module: nn.Module) -> str:
    """The code that loops over experts, of the module or of what is inside it; without a loop, the longest one."""
    own = [candidate for candidate in module.modules() if type(candidate).__module__.startswith("tests.")]
    return max(map(_source, own), key=lambda source: ("for " in source, len(source)))


def _source(module: nn.Module) -> str:
    """The forward, and below it each method that it leads to, but for the router."""
    sources: dict[Callable, str] = {}
    waiting: list[Callable] = [type(module).forward]
    while waiting:
        method = waiting.pop(0)
        if method in sources or not method.__module__.startswith("tests.") or method.__name__ == "route":
            continue
        sources[method] = textwrap.dedent(inspect.getsource(method)).strip()
        above = super(_class_of(method, module), module)
        for base, name in re.findall(r"\b(self|super\(\))\.(\w+)\(", sources[method]):
            called = getattr(module if base == "self" else above, name)
            if inspect.ismethod(called):
                waiting.append(called.__func__)
    return "\n\n\n".join(sources.values())


def _class_of(method: Callable, module: nn.Module) -> type:
    return next(base for base in type(module).__mro__ if vars(base).get(method.__name__) is method)
