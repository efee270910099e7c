"""Training some of a base's own weights while the others stay frozen."""

import re

import torch
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..config.models import FreezeSettings
from .adapter import told


def freeze(model: PreTrainedModel, settings: FreezeSettings) -> None:
    """Let gradients reach the recipe's choice of weights alone.

    Raises:
        InputError: there are fewer layers, or a pattern matches nothing; what exists is listed.
    """
    # A tied head has a name of its own here.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = [_layers_prefix(model, settings.last_layers)] if settings.last_layers else []
    for pattern in settings.train:
        if not any(re.search(pattern, name) for name in parameters):
            raise InputError(
                f"freeze.train: {pattern!r} is found in no parameter's name; they are "
                f"{told(parameters)}"
            )
        chosen.append(pattern)
    model.requires_grad_(False)
    for name, parameter in parameters.items():
        if any(re.search(pattern, name) for pattern in chosen):
            parameter.requires_grad_(True)


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The decoder layers, and their list's name."""
    count = model.config.get_text_config().num_hidden_layers
    return next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


def _layers_prefix(model: PreTrainedModel, last: int) -> str:
    """A pattern for the names of the last decoder layers' parameters."""
    count = model.config.get_text_config().num_hidden_layers
    if last > count:
        raise InputError(f"freeze.last_layers: {last}, where the model has {count} decoder layers")
    layers, _ = decoder_layers(model)
    numbers = "|".join(str(number) for number in range(count - last, count))
    return rf"^{re.escape(layers)}\.({numbers})\."
