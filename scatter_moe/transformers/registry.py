"""Registers our implementations as soon as transformers' registries exist, without importing transformers."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from scatter_moe.after_import import after_import
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
        after_import(name, _register)


def _register(module: ModuleType) -> None:
    """A transformers older than 5 has no such registry: nothing happens then."""
    registry, function = _REGISTRIES[module.__name__]
    if hasattr(module, registry):
        getattr(module, registry).register(NAME, function)
