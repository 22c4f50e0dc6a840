"""Which parameters of a model are its experts' and which are its routers'.

For freezing, for optimizer groups, and for a dropout of the experts' own. Found by structure, in modules of this
package and in those of transformers alike.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from scatter_moe.routers.router import Router

_ROUTER_NAMES = ("gate", "router")


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all experts, each once.

    A module holds experts if it is an attribute named `experts` (a ModuleList, or experts stacked in one module), or if
    it has `num_experts` and a 3-D parameter of its own with that many matrices (`ParallelExperts` of JetMoE and
    Granite-MoE). Shared experts, which every token passes, are not among them, nor is a router that lives inside.

        optimizer = AdamW([{"params": expert_parameters(model), "lr": 1e-4}, ...])
        for parameter in expert_parameters(model):
            parameter.requires_grad_(False)
    """
    routers = {id(parameter) for parameter in router_parameters(model)}
    yield from _each_once(expert_modules(model), left_out=routers)


def router_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all routers, each once.

    A router is a `scatter_moe.routers.Router`, or a module named `gate` or `router` beside experts (see
    `expert_parameters`).
    """
    yield from _each_once(_router_modules(model), left_out=set())


def set_dropout(model: nn.Module, *, expert: float | None = None, dense: float | None = None) -> None:
    """Sets the rates of a model's `nn.Dropout` modules: those inside experts apart from all others.

    Experts overfit sooner than dense layers on small tasks and want more dropout: expert dropout of the Switch
    Transformer (arXiv 2101.03961). Set before compiling.

    Args:
        expert: the rate inside experts, 0..1; None leaves it.
        dense: the rate everywhere else, 0..1; None leaves it.

    Raises:
        ValueError: a rate is out of range; `expert` is given and there is no `nn.Dropout` inside an expert.
    """
    for name, rate in (("expert", expert), ("dense", dense)):
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"{name}: got {rate}, accepted are rates from 0 to 1")
    in_experts = {
        module for experts in expert_modules(model) for module in experts.modules() if isinstance(module, nn.Dropout)
    }
    if expert is not None and not in_experts:
        raise ValueError(f"expert: got {expert}, but no expert of {type(model).__name__} holds an nn.Dropout")
    for module in model.modules():
        rate = expert if module in in_experts else dense
        if isinstance(module, nn.Dropout) and rate is not None:
            module.p = rate


def expert_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold experts, outermost first."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" or _is_stacked(module):
            yield module


def _router_modules(model: nn.Module) -> Iterator[nn.Module]:
    experts = set(expert_modules(model))
    for module in model.modules():
        if isinstance(module, Router):
            yield module
        if not experts.isdisjoint(module.children()):
            yield from (child for name, child in module.named_children() if name in _ROUTER_NAMES)


def _each_once(modules: Iterable[nn.Module], left_out: set[int]) -> Iterator[nn.Parameter]:
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in left_out:
                left_out.add(id(parameter))
                yield parameter


def _is_stacked(module: nn.Module) -> bool:
    num_experts = getattr(module, "num_experts", None)
    return isinstance(num_experts, int) and any(
        parameter.dim() == 3 and parameter.shape[0] == num_experts for parameter in module.parameters(recurse=False)
    )
