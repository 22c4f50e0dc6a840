"""peft's LoRA on stacked experts (`LoraConfig(target_parameters=...)`) without a sum or a gradient of all experts.

peft's `ParamWrapper` swaps the experts' parameter for `W + s L R` while it calls them, by a parametrization: a sum as
large as the weights of all experts, with a gradient as large again, which Dynamo can't trace. Its forward gets two
other ways of giving the experts the same weights:

    the experts are those of transformers, on the implementation "scatter_moe": they get W and the factors
    the backend traces the frame: they get `torch.baddbmm(W, L, R)`, which the rewrite takes apart (body/low_rank)

Everything else about peft stays as it is: parameters, their names, checkpoints, merging. Where a wrapper does something
that no line here speaks of, peft's own forward runs.

E experts, r rank of an adapter, P and Q the other sizes of a stacked parameter.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_passes.entry.hook import is_captured
from fx_passes.modules.gate import has_hooks
from scatter_moe.after_import import after_import

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ORIGINAL = "scatter_moe_original"


class LowRank(NamedTuple):
    """What an adapter adds to a parameter `[E, P, Q]`: scale * lhs @ rhs, lhs `[E, P, r]` and rhs `[E, r, Q]`."""

    lhs: Tensor
    rhs: Tensor
    scale: float


def joined(adapters: Sequence[LowRank]) -> LowRank:
    """What all of these add."""
    if len(adapters) == 1:
        return adapters[0]
    lhs = torch.cat([adapter.scale * adapter.lhs for adapter in adapters], 2)
    return LowRank(lhs, torch.cat([adapter.rhs for adapter in adapters], 1), 1.0)


def extend_when_imported() -> None:
    """Extends `ParamWrapper` where peft is imported already, or once it is."""
    after_import("peft.tuners.lora.layer", _extend)


def _extend(module: ModuleType) -> None:
    """A peft without `ParamWrapper` has no adapters of parameters."""
    wrapper = getattr(module, "ParamWrapper", None)
    if wrapper is not None and not hasattr(wrapper.forward, _ORIGINAL):
        wrapper.forward = _forward(wrapper.forward)


def _forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        experts, wrappers = _unwrapped(self)
        is_plain = "adapter_names" not in kwargs and not any(has_hooks(wrapper) for wrapper in wrappers[1:])
        if is_plain and all(_is_served(wrapper, experts) for wrapper in wrappers):
            if _takes_adapters(experts):
                return experts(x, *args, **kwargs, adapters={w.parameter_name: list(_factors(w)) for w in wrappers})
            if is_captured():
                adapted = {wrapper.parameter_name: _adapted(wrapper, experts) for wrapper in wrappers}
                return torch.func.functional_call(experts, adapted, (x, *args), kwargs)
        return original(self, x, *args, **kwargs)

    setattr(forward, _ORIGINAL, original)
    return forward


def _unwrapped(wrapper: Any) -> tuple[nn.Module, list[Any]]:
    """The experts, and all wrappers around them, of one parameter each, from outside in."""
    kind, wrappers = type(wrapper), []
    while isinstance(wrapper, kind):
        wrappers.append(wrapper)
        wrapper = wrapper.base_layer
    return wrapper, wrappers


def _is_served(wrapper: Any, experts: nn.Module) -> bool:
    """Whether the wrapper adds low-rank products to a parameter of several experts, and does nothing else."""
    parameter = getattr(experts, wrapper.parameter_name)
    plain = not wrapper.disable_adapters and not wrapper.merged
    return plain and parameter.dim() == 3 and wrapper.num_experts > 1 and parameter.dtype in _FLOATS


def _takes_adapters(experts: nn.Module) -> bool:
    """Whether transformers calls our implementation for these experts."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return implementation == "scatter_moe" and hasattr(experts, "has_gate")


def _factors(wrapper: Any) -> Iterator[LowRank]:
    """Of each active adapter. peft stores A as `[E * r, in]` and B as `[out, r * E]`, the expert running fastest."""
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
            is_out_in = getattr(wrapper, "_did_swap_in_out_features", False)
            lhs, rhs = (b, a) if is_out_in else (a.transpose(1, 2), b.transpose(1, 2))
            yield LowRank(lhs, rhs, wrapper.scaling[name])


def _adapted(wrapper: Any, experts: nn.Module) -> Tensor:
    """The parameter as peft gives it to the experts: the sum is made in its dtype, under autocast too."""
    parameter = getattr(experts, wrapper.parameter_name)
    with torch.autocast(parameter.device.type, enabled=False):
        for lhs, rhs, scale in _factors(wrapper):
            lhs, rhs = lhs.to(parameter.dtype), rhs.to(parameter.dtype)
            parameter = torch.baddbmm(parameter, lhs, rhs, alpha=scale)
    return parameter
