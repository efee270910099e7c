"""Finds the files of a model's tokenizer and configuration on this machine."""

import re
from pathlib import Path

from ..common.errors import InputError
from .models import ModelSettings
from .remote_code import check_remote_code

_TOKENIZER_FILE = re.compile(
    r"(tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|vocab.*|merges\.txt|.*\.model|.*\.tiktoken|.*\.jinja)"
)
_VOCABULARY_FILE = re.compile(r"(tokenizer\.json|vocab.*|.*\.model|.*\.tiktoken)")
_FETCHED = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_NOT_FETCHED = ["*.safetensors.index.json", "*.bin.index.json"]
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


def model_folder(
    model: ModelSettings, only_cached: bool = False, weights: bool = False
) -> Path | None:
    """The local model folder, or the snapshot of a hub model with its small files.

    Args:
        model: the recipe's model.
        only_cached: do not ask the hub; None where its cache holds nothing.
        weights: fetch its weights too, as far as they are safetensors.

    Raises:
        InputError: where the folder does not exist, the hub does not give the model, or it needs
            code of its own that the recipe does not trust.
    """
    folder = _find(model, only_cached, weights)
    if folder is not None:
        check_remote_code(model, folder)
    return folder


def _find(model: ModelSettings, only_cached: bool, weights: bool) -> Path | None:
    if Path(model.base).is_absolute():
        if not Path(model.base).is_dir():
            raise InputError(f"model.base: there is no folder {model.base}")
        return Path(model.base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model.base,
            revision=model.revision,
            allow_patterns=[*_FETCHED, *_WEIGHTS] if weights else _FETCHED,
            ignore_patterns=None if weights else _NOT_FETCHED,
            local_files_only=only_cached,
        )
    except HFValidationError:
        raise InputError(
            f"model.base: {model.base!r} is neither a folder nor a hub id (owner/name)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if only_cached:
            return None
        raise InputError(f"model.base: cannot fetch {model.base} from the hub: {error}") from None
    return Path(folder)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide how a model's tokenizer works, sorted."""
    return sorted(
        file for file in folder.iterdir() if file.is_file() and _TOKENIZER_FILE.fullmatch(file.name)
    )


def has_vocabulary(folder: Path) -> bool:
    """True if a folder holds a tokenizer."""
    return any(_VOCABULARY_FILE.fullmatch(file.name) for file in folder.iterdir())
