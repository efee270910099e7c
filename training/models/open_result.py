"""Opens a trained model of a finished run, of a folder written by transformers or PEFT, or of the
hub. All users of a result (references, reward models, …) open it here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..common.errors import InputError
from ..config.adapter_folder import CONFIG_FILE, check_safetensors
from ..config.models import Head
from ..records.run_folder import FinishedRun
from .loading import AUTO_CLASSES, Model, head_arguments

# No pickled weights, and no code of the model's own.
_SAFELY = {"use_safetensors": True, "trust_remote_code": False}


@dataclass(frozen=True)
class OpenedModel:
    """A trained model and its tokenizer, on the CPU."""

    model: Model
    tokenizer: Any


def open_result(run: FinishedRun, head: Head, dtype: torch.dtype, where: str) -> OpenedModel:
    """The model that a run trained; an adapter comes on the run's base.

    Args:
        run: the run.
        head: causal for a language model, score for a reward model.
        dtype: type of the weights.
        where: the key in the recipe, for messages.

    Raises:
        InputError: the model cannot be loaded.
    """
    with run.local_result() as folder, _load_errors(where, run.folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if run.kind == "model":
            return OpenedModel(_load(folder, head, dtype, head_arguments(head)), tokenizer)
        settings = run.recipe["model"]
        base, revision = settings["base"], settings.get("revision")
        return OpenedModel(_under_adapter(folder, base, revision, head, dtype, where), tokenizer)


def open_model(name: str, head: Head, dtype: torch.dtype, where: str) -> Model:
    """A model by hub id or folder; the folder may hold an adapter, which names its base.

    Args:
        name: hub id, or a folder written by transformers or PEFT.
        head: causal for a language model, score for a sequence classifier.
        dtype: type of the weights.
        where: the key in the recipe, for messages.

    Raises:
        InputError: the model cannot be loaded.
    """
    config_file = Path(name) / CONFIG_FILE
    with _load_errors(where, name):
        if not config_file.is_file():
            return _load(name, head, dtype, {})
        config = json.loads(config_file.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
        return _under_adapter(Path(name), base, revision, head, dtype, where)


def _under_adapter(
    adapter: Path, base: str, revision: str | None, head: Head, dtype: torch.dtype, where: str
) -> Model:
    check_safetensors(adapter, where)
    model = _load(base, head, dtype, {"revision": revision, **head_arguments(head)})
    adapted: Model = PeftModel.from_pretrained(model, adapter)
    return adapted


def _load(name: str | Path, head: Head, dtype: torch.dtype, more: dict[str, Any]) -> Model:
    model: Model = AUTO_CLASSES[head].from_pretrained(name, dtype=dtype, **_SAFELY, **more)
    return model


@contextmanager
def _load_errors(where: str, name: object) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot load {name}: {error}") from error
