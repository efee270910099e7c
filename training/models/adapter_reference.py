"""The reference model of a run with an adapter, without a second copy of the base.

The reference is the model before the first step. Usually that is the base with the adapter
disabled. If the adapter's initial weights change the model's outputs, a frozen copy of them is a
second PEFT adapter.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from ..common.errors import InputError
from ..config.recipe import Recipe
from .adapter import TRAINED

REFERENCE = "reference"
"""PEFT's name for the frozen copy."""


def add_reference(model: PeftModel, recipe: Recipe) -> None:
    """Make the present weights the reference that `reference_weights` computes with.

    Call it before the first step, and before a checkpoint is loaded. It adds a frozen copy of the
    adapter if the adapter's initial weights change the outputs; an existing copy stays.

    Raises:
        InputError: see `check_reference_copy`.
    """
    if starts_as_base(recipe) or REFERENCE in model.peft_config:
        return
    check_reference_copy(model)
    config = copy.deepcopy(model.peft_config[TRAINED])
    config.inference_mode = True
    model.add_adapter(REFERENCE, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if f".{TRAINED}" in name:
            frozen = model.get_parameter(name.replace(f".{TRAINED}", f".{REFERENCE}"))
            frozen.data = parameter.data.clone()
            frozen.requires_grad_(False)


def check_reference_copy(model: PeftModel) -> None:
    """Refuse an adapter of which PEFT cannot hold a second copy.

    Raises:
        InputError: the adapter changes an embedding that is one matrix with the head.
    """
    if model.peft_config[TRAINED].ensure_weight_tying:
        raise InputError(
            "model.adapter: it changes the embedding, which is one matrix with the head in this "
            "model, and of such an adapter no frozen copy can be the reference; set "
            "method.reference_model, or start from an adapter without embed_tokens and lm_head"
        )


def starts_as_base(recipe: Recipe) -> bool:
    """True if the model before the first step computes what its base does."""
    return recipe.model.adapter is None and (
        recipe.adapter is None or recipe.adapter.init not in ("pissa", "olora", "loftq")
    )


@contextmanager
def reference_weights(model: PeftModel) -> Iterator[None]:
    """Inside, the model computes with its weights from before the first step.

    Call the model without gradients inside. Afterwards the same parameters as before require
    gradients.
    """
    trainable = [parameter.requires_grad for parameter in model.parameters()]
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
        for parameter, is_trainable in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(is_trainable)


def is_reference_copy(name: str) -> bool:
    """True if the parameter of this name belongs to the frozen copy."""
    return f".{REFERENCE}" in name
