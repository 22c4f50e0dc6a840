"""Every architecture with experts that the installed transformers has, of whatever release from 4.36 on.

Up to 4.57 each model has loops of its own in its sparse block. From 5.0 on most have their experts in one class behind
`@use_experts_implementation`; these are `dispatched`.
"""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import nn

from tests.models.configs import give_unit_scale
from tests.models.tiny import SETTINGS, tiny

_DISPATCHED = re.compile(r"^@use_experts_implementation\b.*\nclass (\w+)\(", re.MULTILINE)
_BLOCK = re.compile(
    r"^class (\w*(?:SparseMoeBlock|MoE|Moe|MoELayer|MoA|SparseMLP)|DbrxFFN|GptOssMLP)\(nn\.Module\)", re.MULTILINE
)
_WHOLE = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "ForTokenClassification")


@dataclass(frozen=True)
class Architecture:
    """One modeling file of transformers.

    Attributes:
        name: its folder.
        blocks: the classes that hold a layer's experts: those that are dispatched, else the sparse blocks.
        dispatched: whether the implementation of its experts can be chosen.
        model_class: the class of its whole model, if there is one.
    """

    name: str
    blocks: tuple[str, ...]
    dispatched: bool
    model_class: type[nn.Module] | None

    def make(self, experts_implementation: str | None = None, seed: int = 0) -> nn.Module:
        """The model in fp32 with weights of unit scale, so that experts matter to the result."""
        assert self.model_class is not None
        config = tiny(self.model_class.config_class, **SETTINGS.get(self.name, {}))
        torch.manual_seed(seed)
        chosen = {"experts_implementation": experts_implementation} if self.dispatched else {}
        model = self.model_class._from_config(config, attn_implementation="eager", **chosen)
        give_unit_scale(model)
        return model


def architectures() -> list[Architecture]:
    """Sorted by name."""
    found = []
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        name, source = file.parent.name, file.read_text()
        if file.stem != f"modeling_{name}":  # of another framework
            continue
        dispatched = tuple(_DISPATCHED.findall(source))
        blocks = dispatched or tuple(_BLOCK.findall(source))
        if blocks:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            found.append(Architecture(name, blocks, bool(dispatched), _whole_model(module)))
    return found


def _whole_model(module: ModuleType) -> type[nn.Module] | None:
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    for ending in _WHOLE:
        for candidate in own:
            if candidate.__name__.endswith(ending) and getattr(candidate, "config_class", None) is not None:
                return candidate
    return None
