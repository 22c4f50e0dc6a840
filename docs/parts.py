"""docs/parts.md: the public Python API, from its signatures and docstrings."""

import inspect
from types import ModuleType

import scatter_moe
from scatter_moe import routers

INTRODUCTION = """\
# Layers, routers, losses

Everything that `import scatter_moe` offers. Layers, routers and losses compile with `fullgraph=True`, under stock
Inductor and under the backend, and export. Shapes: T tokens, K experts per token, E experts, D model width, F expert
width."""


def text() -> str:
    sections = [INTRODUCTION, *_sections(scatter_moe), "## scatter_moe.routers", inspect.getdoc(routers) or ""]
    return "\n\n".join([*sections, *_sections(routers)]) + "\n"


def _sections(module: ModuleType) -> list[str]:
    """One section a name of `__all__`: signature, docstring as it stands, and a class's own public methods."""
    sections = []
    for name in module.__all__:
        documented = getattr(module, name)
        if inspect.ismodule(documented):
            continue
        sections += [f"### `{name}`", _block(documented, name)]
        if inspect.isclass(documented):
            for method, function in vars(documented).items():
                if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                    sections.append(_block(function, method))
    return sections


def _block(documented: object, name: str) -> str:
    signature = f"{name}{_signature(documented)}"
    doc = inspect.getdoc(documented)
    if doc is None:
        raise ValueError(f"{name} has no docstring")
    return f"```text\n{signature}\n\n{doc}\n```"


def _signature(documented: object) -> str:
    """Names and defaults alone: types are in the docstring, as shapes."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(documented).parameters.values()  # pyright: ignore[reportArgumentType]
        if parameter.name != "self"
    ]
    return str(inspect.Signature(parameters))
