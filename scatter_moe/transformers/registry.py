"""Registers our implementations as soon as transformers' registries exist, without importing transformers."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from scatter_moe.transformers.experts import experts_forward, fp8_experts_forward

NAME = "scatter_moe"


def _expert_parallel(experts: Any, ep_mesh: Any, tp_mesh: Any) -> Any:
    """The implementation is a subclass of transformers' own class, which is there once this is called."""
    from scatter_moe.transformers.expert_parallel import ExchangeEP

    return ExchangeEP(experts, ep_mesh, tp_mesh)


_REGISTRIES: dict[str, tuple[str, Callable]] = {
    "transformers.integrations.moe": ("ALL_EXPERTS_FUNCTIONS", experts_forward),
    "transformers.integrations.finegrained_fp8": ("ALL_FP8_EXPERTS_FUNCTIONS", fp8_experts_forward),
    "transformers.distributed.expert_parallel": ("EPImplementationInterface", _expert_parallel),
}


def register_when_imported() -> None:
    """Registers in the modules that are imported already, and in the others once they are."""
    for name in _REGISTRIES:
        if name in sys.modules:
            _register(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(module: ModuleType) -> None:
    """A transformers older than 5 has no such registry: nothing happens then."""
    registry, function = _REGISTRIES[module.__name__]
    if hasattr(module, registry):
        getattr(module, registry).register(NAME, function)


class _AfterImport:
    """Finds the registries as the other finders do, and adds a step after their execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTRIES:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec
