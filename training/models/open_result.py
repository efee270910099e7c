"""Opens a trained model of a finished run, of a folder written by transformers or PEFT, or of the
hub. All users of a result (references, reward models, …) open it here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from ..common.errors import InputError
from ..config.adapter_folder import CONFIG_FILE, adapter_base, check_safetensors
from ..config.model_folder import named_model
from ..config.models import Head
from ..records.run_folder import FinishedRun
from .adapter import check_fits
from .loading import Model, head_arguments
from .out_of_memory import is_out_of_memory
from .pretrained import load_pretrained
from .tokens import room_for_adapter


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
            model = _load(folder, head, dtype, where, **head_arguments(head))
            return OpenedModel(model, tokenizer)
        settings = run.recipe["model"]
        base, revision = settings["base"], settings.get("revision")
        return OpenedModel(_under_adapter(folder, base, revision, head, dtype, where), tokenizer)


def open_model(name: str, head: Head, dtype: torch.dtype, where: str) -> Model:
    """A model by hub id or folder; the folder may hold an adapter, which names its base.

    Args:
        name: hub id (also owner/name@revision), or a folder written by transformers or PEFT.
        head: causal for a language model, score for a sequence classifier.
        dtype: type of the weights.
        where: the key in the recipe, for messages.

    Raises:
        InputError: the model cannot be loaded.
    """
    with _load_errors(where, name):
        if not (Path(name) / CONFIG_FILE).is_file():
            model = named_model(name)
            return _load(model.base, head, dtype, where, revision=model.revision)
        base, revision = adapter_base(Path(name), head, where)
        return _under_adapter(Path(name), base, revision, head, dtype, where)


def _under_adapter(
    adapter: Path, base: str, revision: str | None, head: Head, dtype: torch.dtype, where: str
) -> Model:
    check_safetensors(adapter, where)
    model = _load(
        *(base, head, dtype, where),
        new_head=head == "score",  # the adapter brings it
        revision=revision,
        **head_arguments(head),
    )
    room_for_adapter(model, adapter)
    try:
        adapted: Model = PeftModel.from_pretrained(model, adapter)
    except RuntimeError as error:  # a tensor of another shape
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: {adapter} does not fit {base}: {reason}") from error
    check_fits(adapted, adapter, where)
    return adapted


def _load(
    name: str | Path, head: Head, dtype: torch.dtype, where: str, **more: Any
) -> PreTrainedModel:
    return load_pretrained(name, head, where, dtype=dtype, trust_remote_code=False, **more)


@contextmanager
def _load_errors(where: str, name: object) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot load {name}: {error}") from error
