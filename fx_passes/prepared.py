"""Models that are rewritten under every Dynamo backend, not under ours alone.

`prepare(model)` remembers the model and its submodules. It changes nothing in them: eager runs the original, copies and
checkpoints know nothing.
"""

from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakSet

from torch import nn

from fx_passes.export import extend_export

Model = TypeVar("Model", bound=nn.Module)

_prepared: WeakSet[nn.Module] = WeakSet()


def prepare(model: Model) -> Model:
    """Does for every Dynamo backend and for torch.export what `backend="scatter_moe"` does by itself.

    Call it before the first compile: code that was compiled earlier stays as it is.

    Args:
        model: compiled as a whole, submodule by submodule, or held by a function that is compiled.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    extend_export(lambda exported: holds_prepared([exported]))
    _prepared.update(model.modules())
    return model


def holds_prepared(values: Iterable[Any]) -> bool:
    """Whether one of `values` (a frame's locals) is a prepared module or holds one."""
    if not _prepared:
        return False
    return any(module in _prepared for value in values if isinstance(value, nn.Module) for module in value.modules())
