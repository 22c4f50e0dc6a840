"""`stack_experts`: a ModuleList of experts for a compile time, and guards, that do not grow with their number."""

from typing import TypeVar

from torch import nn

from fx_passes.modules.expert_stacks import stack, why_not

Model = TypeVar("Model", bound=nn.Module)


def stack_experts(model: Model) -> Model:
    """Moves the parameters of the experts in each ModuleList into one buffer a name (all `w1.weight`, all `w2.weight`).

        scatter_moe.stack_experts(model)
        model = torch.compile(model, backend="scatter_moe")

    The compiled graph then has one input for all `w1.weight` of a layer and one guard for its experts, where it has an
    input and guards for each parameter otherwise. Modules, parameters and their names stay what they are, for
    optimizers and checkpoints, too: each parameter becomes a part of a buffer in place. It takes the memory of one
    buffer more while it works.

    Whatever takes the experts apart later is noticed in the next call, which compiles anew and is right, but has each
    parameter as an input again: moving the model to another device or dtype, loading a checkpoint with `assign=True`, a
    new parameter or hook, freezing some of the experts, FSDP. A copy of the model is not stacked. Call it again then. A
    write to one expert between forward and backward counts as a write to all of its layer: backward raises.
    `safetensors.torch.save_model` refuses tensors that are parts of a larger storage; `save_file` takes them.

    Args:
        model: one with ModuleLists named `experts`, or such a list, whatever its name. Call it where the model has its
            device and dtype and before it is compiled, run, or wrapped in DistributedDataParallel.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no such list; or the experts of one differ, share parameters, are on the meta device, or
            have parameters with hooks, weak references or strides of their own. Nothing was changed then.
        RuntimeError: a parameter is in use, by autograd or by a wrapper of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    lists = {"model": model} if isinstance(model, nn.ModuleList) else _lists_of_experts(model)
    if not lists:
        raise ValueError(f"model: got {type(model).__name__} without a ModuleList named `experts`; hand over the list")
    for name, experts in lists.items():
        reason = why_not(experts)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
    for experts in lists.values():
        stack(experts)
    return model


def _lists_of_experts(model: nn.Module) -> dict[str, nn.ModuleList]:
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return {name: module for name, module in lists if name.rpartition(".")[2] == "experts"}
