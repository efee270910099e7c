"""Trains some of the base's own weights and freezes the others."""

import re

import torch
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..config.models import FreezeSettings
from .composite import is_composite, is_in_towers, towers
from .targets import shorten


def freeze(model: PreTrainedModel, settings: FreezeSettings) -> None:
    """Freeze every parameter except those that the recipe selects.

    Raises:
        InputError: the model has fewer layers, or a pattern matches no parameter; the message
            lists the existing names.
    """
    outside = towers(model)
    # Duplicates too: a tied head then has its own name.
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not is_in_towers(name, outside)
    }
    chosen = [_layers_prefix(model, settings.last_layers)] if settings.last_layers else []
    for pattern in settings.train:
        if not any(re.search(pattern, name) for name in parameters):
            raise InputError(
                f"freeze.train: {pattern!r} matches no parameter that text reaches; those are "
                f"{shorten(parameters)}"
            )
        chosen.append(pattern)
    model.requires_grad_(False)
    for name, parameter in parameters.items():
        if any(re.search(pattern, name) for pattern in chosen):
            parameter.requires_grad_(True)


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The name of the list of decoder layers, and the list."""
    count = model.config.get_text_config().num_hidden_layers
    part = model.get_decoder() if is_composite(model.config) else model
    inside = {id(module) for module in part.modules()}
    return next(
        (name, module)
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


def _layers_prefix(model: PreTrainedModel, last: int) -> str:
    """A regular expression for the parameter names of the last `last` decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    if last > count:
        raise InputError(
            f"freeze.last_layers: {last} is too large; the model has {count} decoder layers"
        )
    layers, _ = decoder_layers(model)
    numbers = "|".join(str(number) for number in range(count - last, count))
    return rf"^{re.escape(layers)}\.({numbers})\."
