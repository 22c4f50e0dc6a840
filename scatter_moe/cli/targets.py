"""What `scatter-moe explain` is pointed at: a factory in a module, or a configuration of transformers."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from scatter_moe.cli.errors import UsageError, first_line

OWN_CODE = "own code"


@dataclass(frozen=True)
class Target:
    """A model and what it is called with.

    `layers` says how many of a configuration's layers were built ("4 of 61"), `experts` which experts_implementation
    transformers runs, "own code" for a model without that interface; both are None for a factory.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    layers: str | None = None
    experts: str | None = None


def from_factory(text: str) -> Target:
    """MODULE:FACTORY, found as `python -m` would find it. FACTORY() returns (model, inputs)."""
    module_name, _, factory_name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if not (module_name and factory_name):
        raise UsageError(f"got {text!r}, accepted is MODULE:FACTORY, both with a name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"can't import {module_name}: {error}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UsageError(f"{module_name} has no function {factory_name!r}")
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], tuple | dict)):
        raise UsageError(f"{text}() must return (model, inputs), inputs a tuple or a dict; got {type(made).__name__}")
    model, inputs = made
    return Target(text, model, kwargs=inputs) if isinstance(inputs, dict) else Target(text, model, inputs)


def from_config(options: argparse.Namespace) -> Target:
    """A model of transformers with random weights, or none at all on the meta device."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("an HF_CONFIG needs transformers: pip install 'scatter-moe[transformers]'")
    config = _load_config(options.target)
    layers = _limit_layers(config, options.layers)
    model_class = _model_class(config)
    settings = {} if options.experts is None else {"experts_implementation": options.experts}
    try:
        with torch.device(options.device):
            model = model_class.from_config(config, dtype=torch.bfloat16, **settings).eval()
            tokens = torch.zeros(1, options.tokens, dtype=torch.long)
    except Exception as error:  # a default configuration may lack what its model reads
        raise UsageError(f"can't build {options.target}: {type(error).__name__}: {first_line(error)}") from error
    kwargs = {"input_ids": tokens, "use_cache": False}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = tokens
    return Target(
        f"{type(model).__name__} ({options.target})",
        model,
        kwargs=kwargs,
        device=options.device,
        layers=layers,
        experts=model.config._experts_implementation if model._can_set_experts_implementation() else OWN_CODE,
    )


def _load_config(text: str) -> Any:
    """A model type's default configuration, or what transformers loads by that name or path."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return AutoConfig.for_model(text) if text in CONFIG_MAPPING else AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't load a configuration from {text!r}: {first_line(error)}") from error


def _limit_layers(config: Any, most: int) -> str | None:
    """Cuts a configuration to its first layers; lists with an entry a layer are cut too."""
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int) or total <= most:
        return None if total is None else f"{total} of {total}"
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:most])
    config.num_hidden_layers = most
    return f"{most} of {total}"


def _model_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for model_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        if type(config) in model_class._model_mapping:
            return model_class
    raise UsageError(f"{type(config).__name__} is no configuration of a language model")
