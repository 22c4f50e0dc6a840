"""Compares every experts class of transformers with its own eager code, and writes the table in docs/transformers.md.

    python -m docs.transformers_experts

A class counts if transformers decorates it with `@use_experts_implementation`. Its module is built alone, with the
defaults of its model's configuration and tiny sizes. Outputs and all gradients must be those of the class's own loop.
"""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn

import scatter_moe  # noqa: F401  registers the implementation
from scatter_moe.transformers.experts import gate_of

PAGE = Path(__file__).parent / "transformers.md"
BEGIN, END = "<!-- begin: experts (docs/transformers_experts.py) -->", "<!-- end: experts -->"
T, K, E, D, F = 48, 2, 6, 16, 12
TINY = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), F),
    "swiglu_limit": 0.75,  # so low that unit-scale values reach it
}
_DECORATED = re.compile(r"^@use_experts_implementation\b.*\nclass (\w+)\(", re.MULTILINE)
_READ = re.compile(r"config\.(\w+)")


@dataclass(frozen=True)
class Experts:
    """An experts class by its name and by that of its model's folder."""

    model: str
    name: str

    def __str__(self) -> str:
        return self.name

    def module(self, implementation: str, seed: int = 0) -> nn.Module:
        """With random weights that keep rows at unit scale, the same for every implementation."""
        modeling = importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}")
        experts_class = getattr(modeling, self.name)
        config = _tiny_config(self.model, experts_class)
        config._experts_implementation = implementation
        takes_width = "intermediate_size" in inspect.signature(inspect.unwrap(experts_class.__init__)).parameters
        module = experts_class(config, F) if takes_width else experts_class(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        return module

    def row(self) -> str:
        """Its line of the table."""
        module = self.module("scatter_moe")
        flags = ("has_bias", "is_transposed", "has_post_expert_norm")
        notes = [flag.split("_", 1)[1].replace("_", " ") for flag in flags if getattr(module, flag, False)]
        gate = gate_of(module)
        runs_as = f"`mlp`, {gate.activation}, {gate.layout}" if gate else "`parallel_linear`, its own code, `combine`"
        return f"| {self.model} | `{self.name}` | {', '.join(notes)} | {runs_as} |"


def experts_classes() -> list[Experts]:
    """All that are decorated in the installed transformers."""
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return [Experts(file.parent.name, name) for file in files for name in _DECORATED.findall(file.read_text())]


def run(
    module: nn.Module,
    absent: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    drawn_in: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Output and gradients by name for random unit-scale inputs and upstream gradients.

    Args:
        module: an experts module.
        absent: the id of the slots that another rank computes. Their weights are zero, and so, in the result, are their
            gradients: with a sentinel (E or more) they must be, while some classes' own loops only take an expert's id.
        seed: of inputs and upstream gradients.
        dtype: of inputs.
        drawn_in: the dtype that random numbers are rounded to first, if it isn't `dtype`.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def rounded(drawn: Tensor) -> Tensor:
        return drawn.to(drawn_in or dtype).to(dtype)

    x = rounded(torch.randn(T, D, generator=generator)).requires_grad_()
    topk_ids = torch.rand(T, E - 1, generator=generator).argsort(dim=1)[:, :K]  # the last expert gets no token
    is_absent = torch.zeros(T, K, dtype=torch.bool)
    is_absent[::5, 0] = True
    topk_weights = rounded(torch.rand(T, K, generator=generator)).masked_fill(is_absent, 0.0).requires_grad_()
    module.zero_grad()
    out = module(x, topk_ids.masked_fill(is_absent, absent), topk_weights)
    out.backward(rounded(torch.randn(out.shape, generator=generator)))
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert topk_weights.grad is not None
    if absent < E:
        topk_weights.grad.masked_fill_(is_absent, 0.0)
    return {"out": out.detach(), "hidden_states": x.grad, "top_k_weights": topk_weights.grad, **grads}


def table() -> str:
    rows = [experts.row() for experts in experts_classes()]
    head = ["| model | class | parameters | runs as |", "|---|---|---|---|"]
    note = f"{len(rows)} classes of transformers {transformers.__version__}."
    return "\n".join([BEGIN, "", *head, *rows, "", note, "", END])


def _tiny_config(model: str, experts_class: type) -> transformers.PreTrainedConfig:
    """The defaults of the model's configuration that has what the class reads, at tiny sizes."""
    reads = set(_READ.findall(inspect.getsource(inspect.unwrap(experts_class.__init__))))
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    for config_class in _config_classes(configuration):
        config = config_class()
        if all(_has(config, name) for name in reads):
            for name in reads & TINY.keys():
                is_list = isinstance(getattr(config, name), list)
                setattr(config, name, [TINY[name]] if is_list else TINY[name])
            return config
    raise LookupError(f"{experts_class.__name__}: no configuration of {model} has {sorted(reads)}")


def _has(config: transformers.PreTrainedConfig, name: str) -> bool:
    """False, too, for what varies between layers, which a configuration refuses to say."""
    try:
        return hasattr(config, name)
    except RuntimeError:
        return False


def _config_classes(configuration: ModuleType) -> list[type]:
    classes = [value for value in vars(configuration).values() if inspect.isclass(value)]
    return [
        c for c in classes if issubclass(c, transformers.PreTrainedConfig) and c.__module__ == configuration.__name__
    ]


def main() -> int:
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + table() + page[page.index(END) + len(END) :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
