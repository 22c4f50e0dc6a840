"""Notices that something was written to modules, without looking at what it is.

Watched is all that makes modules alike or not (`fx_passes.modules.likeness`): their classes, attributes, submodules,
hooks, and which tensors they have, of what kind and where. Values of tensors are not. A dict has a version, which
every write changes; what is empty is looked at for having become more. So a look costs little.
"""

from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version

from fx_passes.modules.likeness import containers_in

_kind_of = attrgetter("requires_grad", "dtype")


class Watch:
    """What a module is at the moment, and all in it. It keeps these alive, but not the module itself."""

    def __init__(self, module: nn.Module) -> None:
        _, *self._inner = modules = list(module.modules())
        containers = containers_in(modules)
        self._empty = [container for container in containers if not container]
        filled = list(filter(None, containers))
        self._dicts = [container for container in filled if isinstance(container, dict)]
        self._others = [(part, tuple(part)) for part in filled if type(part) in (list, set)]
        self._tensors = [value for part in self._dicts for value in part.values() if isinstance(value, Tensor)]
        self._seen = self._look()

    def shows_no_change(self) -> bool:
        if any(self._empty) or self._look() != self._seen:
            return False
        return all(len(now) == len(seen) and all(map(is_, now, seen)) for now, seen in self._others)

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(type, self._inner)),
            list(map(dict_version, self._dicts)),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.size, self._tensors)),
            list(map(Tensor.stride, self._tensors)),
            list(map(_kind_of, self._tensors)),
        )
