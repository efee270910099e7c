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
from ..common.scratch import scratch_folder
from ..common.storage import Folder
from ..config.adapter_folder import (
    CONFIG_FILE,
    adapter_base,
    check_safetensors,
    is_base_unchanged,
)
from ..config.model_folder import has_vocabulary, model_folder, named_model
from ..config.models import Head, ModelSettings
from ..config.paths import is_folder
from ..config.recipe import Recipe
from ..records.run_folder import FinishedRun
from .adapter import check_fits
from .loading import Model, head_arguments, load_tokenizer
from .out_of_memory import is_out_of_memory
from .pretrained import load_pretrained, not_loaded
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


def open_named(name: str, dtype: torch.dtype, where: str) -> OpenedModel:
    """A language model by hub id or folder (see `open_model`), with its tokenizer.

    Raises:
        InputError: the model or its tokenizer cannot be loaded.
    """
    model = open_model(name, "causal", dtype, where)
    tokenizer, _, _ = tokenizer_named(name, where)
    return OpenedModel(model, tokenizer)


def tokenizer_named(name: str, where: str) -> tuple[Any, str, str | None]:
    """The tokenizer of a model as `open_named` takes it, and the model's folder or id, which for
    an adapter is its base, with its revision.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    named, path = named_model(name), Path(name)
    source, revision = named.base, named.revision
    if is_adapter := (path / CONFIG_FILE).is_file():
        source, revision = adapter_base(path, "causal", where)
    if is_adapter and has_vocabulary(path):
        return tokenizer_of(name, where), source, revision
    return tokenizer_of(source, where, revision), source, revision


def tokenizer_of(name: str | Path, where: str, revision: str | None = None) -> Any:
    """The tokenizer of a folder or of a hub id.

    Raises:
        InputError: it cannot be loaded.
    """
    with _load_errors(where, name):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)


def open_checkpoint(
    recipe: Recipe, checkpoint: Folder, dtype: torch.dtype, where: str
) -> OpenedModel:
    """The model as a checkpoint of a run holds it.

    Args:
        recipe: the run's recipe.
        checkpoint: the checkpoint's folder.
        dtype: type of the weights.
        where: what names it, for messages.

    Raises:
        InputError: the model cannot be loaded.
    """
    if recipe.adapter is not None and recipe.adapter.changes_base:
        raise InputError(
            f"{where}: with adapter.init {recipe.adapter.init} a checkpoint is not an adapter on "
            "the base; finish the run"
        )
    with local_copy(checkpoint) as folder, _load_errors(where, checkpoint):
        tokenizer = load_tokenizer(recipe)
        if recipe.trains_adapter:
            base, revision = recipe.model.base, recipe.model.revision
            model = _under_adapter(folder, base, revision, "causal", dtype, where)
        else:
            model = _load(folder, "causal", dtype, where)
    return OpenedModel(model, tokenizer)


@contextmanager
def local_copy(folder: Folder) -> Iterator[Path]:
    """A folder on a local disk: itself, or a copy that the context deletes."""
    if folder.local is not None:
        yield folder.local
        return
    with scratch_folder("checkpoint") as scratch:
        folder.download(scratch)
        yield scratch


def _under_adapter(
    adapter: Path, base: str, revision: str | None, head: Head, dtype: torch.dtype, where: str
) -> Model:
    check_safetensors(adapter, where)
    check_base(adapter, base, revision, where)
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
        raise InputError(
            f"{where}: {adapter} does not fit {base}: {reason}; name the base that it was trained "
            "on"
        ) from error
    check_fits(adapted, adapter, where)
    return adapted


def check_base(adapter: Path, base: str, revision: str | None, where: str) -> None:
    """Check that an adapter's base is the one that it was trained on.

    Raises:
        InputError: the base's folder is gone, its weights are others, or base.json is damaged.
    """
    if Path(base).is_absolute() and not is_folder(base):
        raise InputError(
            f"{where}: its base {base} is not there; move it back, or write its new place into the "
            f"run's recipe.yaml (for an adapter without a run, into {CONFIG_FILE})"
        )
    model = ModelSettings(base=base, revision=revision)
    folder = Path(base) if is_folder(base) else model_folder(model, only_cached=True, where=where)
    if folder is not None and not is_base_unchanged(adapter, folder, where):
        raise InputError(
            f"{where}: the weights of its base {base} have changed since the adapter was trained; "
            "restore the original ones"
        )


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
        raise not_loaded(where, name, error) from error
