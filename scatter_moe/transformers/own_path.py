"""Which experts of a transformers model no experts implementation reaches; transformers itself doesn't say so."""

from collections.abc import Iterator

from torch import nn


def notes_on(model: nn.Module) -> Iterator[str]:
    """One sentence a class of experts that stays on transformers' own path, or that is in FP8."""
    told: set[type] = set()
    for path, module in model.named_modules():
        note = _note(module)
        if note is not None and type(module) not in told:
            told.add(type(module))
            yield f"{path}: {type(module).__name__} {note}"


def _note(module: nn.Module) -> str | None:
    if not type(module).__name__.endswith("Experts") or not _is_of_transformers(module):
        return None
    if type(module).__name__.startswith("FP8"):
        return (
            "is in FP8, for which transformers has a registry of its own: neither scatter_moe nor a rewrite serves it"
        )
    if not hasattr(module, "has_gate"):
        return "takes no experts implementation: transformers runs its own code, which the backend alone can rewrite"
    return None


def _is_of_transformers(module: nn.Module) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(module).__mro__)
