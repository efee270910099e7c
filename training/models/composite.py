"""Checkpoints of several modalities, such as vision-language models, trained on text.

Text passes through the language model alone. The other parts, such as a vision tower and its
projector, are loaded with it and stay as they are, so that a result is the whole checkpoint again,
under its own names.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from ..common.errors import InputError
from ..common.formatting import one_line
from ..config.models import Head

_HEADS = ("score", "classifier")


def is_composite(config: Any) -> bool:
    """True for the configuration of a decoder that is one of a checkpoint's several parts."""
    return (
        type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
        and not config.is_encoder_decoder
        and config.get_text_config() is not config
    )


def auto_class(config: Any, head: Head, where: str) -> Any:
    """The auto class of transformers that loads the whole checkpoint of this configuration.

    Args:
        config: the checkpoint's configuration.
        head: causal for a language model, score for a sequence classifier.
        where: the key in the recipe, for messages.

    Raises:
        InputError: transformers has no class with this head for it, or the model does not take
            text alone.
    """
    kind, has_own_code = config.model_type, bool(getattr(config, "auto_map", None))
    if head == "score":
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not has_own_code:
            raise InputError(
                f"{where}: transformers has no sequence classifier for a {kind} model, so it gets "
                "no score head; choose another model"
            )
        return AutoModelForSequenceClassification
    if not is_composite(config):
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_own_code:
            return AutoModelForCausalLM
        if not _is_registered_as_a_part(config):
            raise InputError(
                f"{where}: transformers has no causal language model for a {kind} model; choose a "
                "decoder"
            )
        return AutoModelForImageTextToText
    needed = _needed_inputs(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)])
    if needed:
        raise InputError(
            f"{where}: a {kind} model does not take text alone: it needs {' and '.join(needed)}; "
            "choose another model"
        )
    is_vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_vision else AutoModelForMultimodalLM


def model_from_config(config: Any, head: Head, where: str, **arguments: Any) -> PreTrainedModel:
    """The model of a configuration, with random weights; arguments are those of `from_config`.

    Raises:
        InputError: as `auto_class`, or a part of the model is in a package that is not installed.
    """
    try:
        model: PreTrainedModel = auto_class(config, head, where).from_config(config, **arguments)
    except ImportError as error:
        raise InputError(f"{where}: {one_line(str(error))}; install that package") from error
    return model


def name_of_class(model: Any, head: Head) -> str:
    """The name of the auto class that loads the checkpoint of a model, or of its adapter's base."""
    return str(auto_class(model.config, head, "model.base").__name__)


def _is_registered_as_a_part(config: Any) -> bool:
    """True for a causal language model that transformers lists only with whole checkpoints."""
    listed = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return type(config) in listed and listed[type(config)].__name__.endswith("ForCausalLM")


def _needed_inputs(model_class: Any) -> list[str]:
    """Inputs other than text without which the model computes nothing."""
    parameters = inspect.signature(model_class.forward).parameters
    return [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in ("self", "input_ids")
    ]


def towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the outermost modules and parameters of a composite model that text does not reach.

    These are all outside the language model, its embedding and its head; none in another model.
    """
    if not is_composite(model.config):
        return ()
    used = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    kept = {name for name, module in model.named_modules() if any(module is part for part in used)}
    kept |= {name for name in _HEADS if name in dict(model.named_children())}
    return tuple(_outside(model, "", kept))


def _outside(module: Any, prefix: str, kept: set[str]) -> Iterator[str]:
    """The outermost parts of a module that neither are nor hold a part that is kept."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name
    for name, child in module.named_children():
        whole = prefix + name
        if whole in kept:
            continue
        if any(other.startswith(f"{whole}.") for other in kept):
            yield from _outside(child, f"{whole}.", kept)
        else:
            yield whole


def is_in_towers(name: str, outside: tuple[str, ...]) -> bool:
    """True for the name of a module or parameter in one of these `towers`."""
    return any(name == tower or name.startswith(f"{tower}.") for tower in outside)


def towers_pattern(outside: tuple[str, ...]) -> str | None:
    """A regular expression for the whole names of all modules in these `towers`; None if none."""
    names = "|".join(map(re.escape, outside))
    return rf"({names})(\..*)?" if outside else None


def freeze_towers(model: PreTrainedModel) -> None:
    """Freeze all that text does not reach, adapters in it included."""
    outside = towers(model)
    for name, parameter in model.named_parameters():
        if is_in_towers(name, outside):
            parameter.requires_grad_(False)
