"""Finds the reference model that a recipe names, and checks its tokenizer; without torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import InputError
from .adapter_folder import CONFIG_FILE, RESULT_FOLDER
from .model_folder import model_folder, named_model
from .models import ModelSettings
from .paths import is_folder

_MODEL_FILE = "config.json"
_INSIDE = ("", RESULT_FOLDER, "model")
_VOCABULARY = "tokenizer.json"


def find_reference(name: str, places: Sequence[str]) -> str:
    """The folder of a model or an adapter, also inside a run's folder; a hub id stays.

    Args:
        name: `method.reference_model`.
        places: where a folder of that name may be.

    Raises:
        InputError: for a folder without a model, and for a path where there is none.
    """
    for place in filter(is_folder, places):
        for inside in _INSIDE:
            folder = Path(place) / inside
            if any((folder / file).is_file() for file in (CONFIG_FILE, _MODEL_FILE)):
                return str(folder)
        raise InputError(
            f"method.reference_model: {place} holds no model: there is no {_MODEL_FILE} or "
            f"{CONFIG_FILE} in it, nor in model/ or {RESULT_FOLDER}/, which a run writes when "
            "it finishes; give another folder, or finish that run"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"method.reference_model: there is no such folder: {', '.join(dict.fromkeys(places))}; "
            "give a hub id, a model's folder or a finished run's"
        )
    return name


def check_reference(model: ModelSettings, name: str) -> None:
    """Check that the reference has the same vocabulary as the model.

    Raises:
        InputError: the tokenizers differ.
    """
    base_folder = model_folder(model, only_cached=True)
    named = named_model(name)
    reference = Path(name) if is_folder(name) else model_folder(named, only_cached=True)
    if base_folder is None or reference is None:
        return
    vocabularies = [_vocabulary(folder / _VOCABULARY) for folder in (base_folder, reference)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise InputError(
            f"method.reference_model: the tokenizer of {name} differs from that of "
            f"{model.base}; give a reference with the same tokenizer"
        )


def _vocabulary(file: Path) -> dict[str, int] | None:
    """The tokens of a model and their ids; None where they are in no `tokenizer.json`."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tokens: dict[str, int] = dict(content["model"]["vocab"])
        tokens |= {token["content"]: token["id"] for token in content["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        return None  # of another kind, or damaged: who loads it says so
    return tokens
