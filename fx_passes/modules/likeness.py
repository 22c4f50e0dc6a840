"""Modules that are equal in all but the values of their tensors."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[tuple[str, ...], str, str]
"""Names of submodules, `_parameters` or `_buffers`, a name in it."""

_TENSORS = ("_parameters", "_buffers")
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset)


def are_alike(modules: Sequence[nn.Module]) -> bool:
    """Whether all have the same code and structure, equal attributes, and tensors of their own, equal in kind."""
    if not all(_is_alike(modules[0], module) for module in modules):
        return False
    tensors = [id(tensor) for module in modules for _, tensor in tensors_in(module)]
    return len(set(map(id, modules))) == len(modules) and len(set(tensors)) == len(tensors)


def copy_without_identity(module: nn.Module) -> tuple[nn.Module, dict[int, Path]]:
    """A copy of `module` with tensors of its own that share their data, and the places of these by their id."""
    paths: dict[int, Path] = {}
    return _copy(module, (), paths), paths


def tensor_at(module: nn.Module, path: Path) -> Tensor:
    names, kind, name = path
    for child in names:
        module = vars(module)["_modules"][child]
    return vars(module)[kind][name]


def tensors_in(module: nn.Module, names: tuple[str, ...] = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of a module and of those in it, each as often as it occurs."""
    for kind in _TENSORS:
        for name, tensor in vars(module)[kind].items():
            if tensor is not None:
                yield (names, kind, name), tensor
    for name, child in vars(module)["_modules"].items():
        if child is not None:
            yield from tensors_in(child, (*names, name))


def _is_alike(first: nn.Module | None, other: nn.Module | None) -> bool:
    """Whether what is read from `first` would have been read from `other`, but for the values of tensors."""
    if first is None or other is None:
        return first is other
    mine, others = vars(first), vars(other)
    if type(first) is not type(other) or list(mine) != list(others) or not _is_what_vars_show(type(first)):
        return False
    compare = {"_modules": _is_alike, "_parameters": _is_tensor_alike, "_buffers": _is_tensor_alike}
    return all(_is_equal(value, others[name], compare.get(name)) for name, value in mine.items())


def _is_what_vars_show(kind: type) -> bool:
    """Whether an instance has nothing that `vars` misses, as TorchScript's tensors, and does nothing when it goes."""
    is_scripted = issubclass(kind, torch.jit.ScriptModule)
    return not is_scripted and kind.__basicsize__ == nn.Module.__basicsize__ and not hasattr(kind, "__del__")


def _is_equal(first: Any, other: Any, compare: Callable[[Any, Any], bool] | None = None) -> bool:
    """Equal plain data, or the same object. `compare` tells it of the items of a dict."""
    kind = type(first)
    if kind is not type(other) or kind not in CONTAINERS:
        return first is other or (kind is type(other) and kind in _CONSTANTS and repr(first) == repr(other))
    if not first and not other:
        return True
    if kind in (set, frozenset):
        return first == other and all(type(item) in _CONSTANTS for item in (*first, *other))
    if isinstance(first, dict):
        if list(first) != list(other) or any(type(key) not in _CONSTANTS for key in (*first, *other)):
            return False
        first, other = list(first.values()), list(other.values())
    return len(first) == len(other) and all(map(compare or _is_equal, first, other))


def _is_tensor_alike(first: Tensor | None, other: Tensor | None) -> bool:
    if first is None or other is None:
        return first is other
    if type(first) is not type(other) or type(first) not in (Tensor, nn.Parameter):
        return False
    if first.requires_grad and type(first) is Tensor:  # a copy of it has no gradient function
        return False
    return not _own_attributes(first) and not _own_attributes(other) and _kind_of(first) == _kind_of(other)


def _own_attributes(tensor: Tensor) -> list[str]:
    """Attributes that someone set, but for Dynamo's own."""
    return [name for name in vars(tensor) if not name.startswith("_dynamo")]


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    layout = tensor.stride() if tensor.layout is torch.strided else None
    flags = (tensor.requires_grad, tensor.is_leaf, tensor.is_conj(), tensor.is_neg(), tensor.is_inference())
    return (tensor.shape, layout, tensor.dtype, tensor.device, tensor.layout, *flags)


def containers_in(modules: Iterable[nn.Module]) -> list[Any]:
    """The containers of which a copy of `modules`, not of those in them, has its own, however deep they lie."""
    found: list[Any] = [vars(module) for module in modules]
    for container in filter(None, found):  # which become more meanwhile
        items = container.values() if isinstance(container, dict) else container
        found += [item for item in items if type(item) in CONTAINERS]
    return found


def _copy(module: nn.Module | None, names: tuple[str, ...], paths: dict[int, Path]) -> Any:
    if module is None:
        return None
    twin = object.__new__(type(module))
    for name, attribute in vars(module).items():
        twin.__dict__[name] = _copy_attribute(name, attribute, names, paths)
    return twin


def _copy_data(value: Any) -> Any:
    """`value` without what could be found elsewhere by its identity; what all experts share stays as it is."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copy_data(item)) for key, item in value.items())
    return type(value)(map(_copy_data, value)) if type(value) in CONTAINERS else value


def _copy_attribute(name: str, attribute: Any, names: tuple[str, ...], paths: dict[int, Path]) -> Any:
    if name == "_modules":
        return type(attribute)((child, _copy(module, (*names, child), paths)) for child, module in attribute.items())
    if name not in _TENSORS:
        return _copy_data(attribute)
    twins = type(attribute)()
    for key, tensor in attribute.items():
        twins[key] = None if tensor is None else _copy_tensor(tensor)
        paths[id(twins[key])] = (names, name, key)
    return twins


def _copy_tensor(tensor: Tensor) -> Tensor:
    with torch.inference_mode(tensor.is_inference()):  # outside of it, a tensor made under it takes no gradient
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(tensor.detach(), tensor.requires_grad) if is_parameter else tensor.detach()
