"""The model as it was before the first step, without a second copy of the base.

Mostly that is the base under the adapter. Where the adapter did not start at nothing, a frozen
copy of its first weights stands beside it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from ..config.recipe import Recipe
from .adapter import TRAINED

REFERENCE = "reference"
"""PEFT's name of the frozen copy."""


def add_reference(model: PeftModel, recipe: Recipe) -> None:
    """Make sure that `as_reference` computes with the model as it is now.

    Called before the first step, and before a checkpoint is loaded. It adds a frozen copy of the
    adapter where the recipe's does not start at nothing; a copy that is there already stays.
    """
    starts_at_nothing = recipe.model.adapter is None and (
        recipe.adapter is None or recipe.adapter.init not in ("pissa", "olora", "loftq")
    )
    if starts_at_nothing or REFERENCE in model.peft_config:
        return
    config = copy.deepcopy(model.peft_config[TRAINED])
    config.inference_mode = True
    model.add_adapter(REFERENCE, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if f".{TRAINED}" in name:
            frozen = model.get_parameter(name.replace(f".{TRAINED}", f".{REFERENCE}"))
            frozen.data = parameter.data.clone()
            frozen.requires_grad_(False)


@contextmanager
def as_reference(model: PeftModel) -> Iterator[None]:
    """Inside, the model computes as it did before the first step.

    What requires gradients is the same afterwards; inside, call it without a graph.
    """
    needed = [parameter.requires_grad for parameter in model.parameters()]
    try:
        if REFERENCE in model.peft_config:
            model.set_adapter(REFERENCE, inference_mode=True)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if REFERENCE in model.peft_config:
            model.set_adapter(TRAINED)
        for parameter, wanted in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(wanted)


def is_copy(name: str) -> bool:
    """Whether a parameter belongs to the frozen copy."""
    return f".{REFERENCE}" in name
