"""The one place where stored weights become a model: every tensor must have its place.

transformers gives a tensor that the files lack random values, and leaves out one that the model
lacks. Both are compared here, under the model's own names, so that renamed, converted, tied and
quantised weights count as present.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..common.errors import InputError
from ..common.formatting import one_line
from ..config.models import Head
from .composite import auto_class

Notify = Callable[[str], None]
"""Receives a line about tensors that are not used."""

_HEADS = ("score.", "classifier.", "qa_outputs.")
"""Heads of other tasks than language modelling."""
_OBSOLETE = ("masked_bias", "inv_freq", "k_scale", "v_scale")
"""Constants that older files hold, and scales for a quantised cache of keys and values."""
_SHOWN = 5


def not_loaded(where: str, name: object, error: Exception) -> InputError:
    """The error for a configuration, tokenizer or model that transformers cannot load.

    Args:
        where: the key in the recipe, or the option.
        name: a folder or a hub id.
        error: what transformers says.
    """
    return InputError(
        f"{where}: cannot load {name}: {one_line(str(error))}; check that the name is right and "
        "all of its files are there, or upgrade transformers"
    )


def load_pretrained(
    name: str | Path,
    head: Head,
    where: str,
    *,
    new_head: bool = False,
    notify: Notify = lambda _: None,
    **arguments: Any,
) -> PreTrainedModel:
    """Load a model with `from_pretrained`, from safetensors alone.

    Args:
        name: a folder or a hub id.
        head: causal for a language model, score for a sequence classifier.
        where: the key in the recipe, for messages.
        new_head: True if a head outside the base model may get new values.
        notify: receives a line with the number of tensors that belong to parts which the model
            lacks, such as a head for speculative decoding.
        arguments: further arguments of `from_pretrained`.

    Raises:
        InputError: transformers has no such model with this head, or the weights cannot be read,
            lack a tensor of the model, or hold one of another shape or architecture.
    """
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=arguments.get("revision"),
            trust_remote_code=arguments.get("trust_remote_code"),
        )
        model, info = auto_class(config, head, where).from_pretrained(
            name,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **arguments,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise not_loaded(where, name, error) from error
    except ImportError as error:  # a part of the model is in another library
        raise InputError(
            f"{where}: cannot load {name}: {one_line(str(error))}; install that package"
        ) from error
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing = {key for key in missing if _is_in_base(model, key)}
    if head == "score":  # the language model's head
        unexpected = {key for key in unexpected if _is_in_base(model, key)}
    foreign = _foreign(model, head, unexpected)
    _refuse(f"{where}: {name}", model, missing, foreign, info["mismatched_keys"])
    if unused := unexpected - foreign:
        parts = ", ".join(sorted({_part(model, key) for key in unused})[:_SHOWN])
        notify(f"{where}: {len(unused)} tensors of {name} are not used: {parts}")
    return model


def _refuse(
    place: str,
    model: PreTrainedModel,
    missing: set[str],
    foreign: set[str],
    mismatched: Iterable[tuple[str, Any, Any]],
) -> None:
    faults = []
    if missing:
        faults.append(f"lack {_listed(missing)}, which would get random values")
    if foreign:
        faults.append(f"hold {_listed(foreign)}, which the model has no place for")
    shapes = {f"{key} {list(stored)} instead of {list(own)}" for key, stored, own in mismatched}
    if shapes:
        faults.append(f"have other shapes: {_listed(shapes)}")
    if faults:
        raise InputError(
            f"{place}: the weights do not fit a {type(model).__name__}: they "
            f"{'; they '.join(faults)}; give a complete model of this kind, whose config.json "
            "belongs to its weights"
        )


def _is_in_base(model: PreTrainedModel, key: str) -> bool:
    """True for a tensor of the model under a head, such as a decoder layer's."""
    if model.base_model_prefix:
        return key.startswith(f"{model.base_model_prefix}.")
    return not key.startswith(_HEADS)


def _foreign(model: PreTrainedModel, head: Head, unexpected: set[str]) -> set[str]:
    """The tensors without a place that mean that the weights are of another architecture.

    Those are tensors of modules that the model has, such as a bias too many, tensors in or after
    its layers, and another task's head. A part that the model lacks altogether, such as a vision
    tower or a head for speculative decoding, is left out on purpose.
    """
    buffers = {name for name, _ in model.named_buffers()}
    holders = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) or not list(module.children())
    }
    foreign = set()
    for key in unexpected - buffers:
        parents = {key.rsplit(".", count)[0] for count in range(1, key.count(".") + 1)}
        is_held = not parents.isdisjoint(holders) and not key.endswith(_OBSOLETE)
        is_other_head = head == "causal" and key.startswith(_HEADS)
        if is_other_head or (is_held and not _is_extra_layer(model, key)):
            foreign.add(key)
    return foreign


def _is_extra_layer(model: PreTrainedModel, key: str) -> bool:
    """True for layers after the last one, which predict several tokens at once."""
    config = model.config.get_text_config()
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    first = config.num_hidden_layers
    return any(f".layers.{first + number}." in f".{key}" for number in range(extra))


def _part(model: PreTrainedModel, key: str) -> str:
    """The outermost module of a tensor that the model lacks."""
    prefix = f"{model.base_model_prefix}."
    base = prefix if key.startswith(prefix) else ""
    return base + key.removeprefix(base).partition(".")[0]


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
