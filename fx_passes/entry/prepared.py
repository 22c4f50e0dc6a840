"""Models that are rewritten under every Dynamo backend, not under ours alone.

`prepare(model)` remembers the model and its submodules. It changes nothing in them: eager runs the original, copies and
checkpoints know nothing.
"""

from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from fx_passes.entry.export import extend_export

Model = TypeVar("Model", bound=nn.Module)

_prepared: WeakSet[nn.Module] = WeakSet()
_hook_is_missing = False


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
        raise TypeError(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    extend_export(lambda exported: holds_prepared([exported]))
    _prepared.update(model.modules())
    if _hook_is_missing:
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
    return model


def without_hook() -> None:
    """From now on `prepare` does what is left where Dynamo can't be extended: loops over range(E) become traceable."""
    global _hook_is_missing
    _hook_is_missing = True


def holds_prepared(values: Iterable[Any]) -> bool:
    """Whether one of `values` (a frame's locals) is a prepared module or holds one."""
    if not _prepared:
        return False
    return any(module in _prepared for value in values if isinstance(value, nn.Module) for module in value.modules())
