"""Finds the files of a model's tokenizer and configuration on this machine."""

import re
from pathlib import Path

from ..common.errors import InputError
from ..common.formatting import one_line, shown
from .models import ModelSettings
from .paths import is_folder
from .remote_code import check_remote_code

_TOKENIZER_FILE = re.compile(
    r"(tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|vocab.*|merges\.txt|.*\.model|.*\.tiktoken|.*\.jinja)"
)
_VOCABULARY_FILE = re.compile(r"(tokenizer\.json|vocab.*|.*\.model|.*\.tiktoken)")
_PROCESSOR_FILE = re.compile(r"(\w*preprocessor|processor)_config\.json")
_FETCHED = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_NOT_FETCHED = ["*.safetensors.index.json", "*.bin.index.json"]
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


def named_model(name: str) -> ModelSettings:
    """The settings of a model that a recipe names: a folder, owner/name or owner/name@revision."""
    if Path(name).is_absolute():
        return ModelSettings(base=name)
    base, _, revision = name.partition("@")
    return ModelSettings(base=base, revision=revision or None)


def model_folder(
    model: ModelSettings,
    only_cached: bool = False,
    weights: bool = False,
    where: str = "model.base",
) -> Path | None:
    """The local model folder, or the snapshot of a hub model with its small files.

    Args:
        model: the recipe's model.
        only_cached: do not ask the hub; None where its cache holds nothing.
        weights: fetch its weights too, as far as they are safetensors.
        where: the key in the recipe, for messages.

    Raises:
        InputError: where the folder does not exist, the hub does not give the model, or it needs
            code of its own that the recipe does not trust.
    """
    folder = _find(model, only_cached, weights, where)
    if folder is not None:
        check_remote_code(model, folder, where)
    return folder


def _find(model: ModelSettings, only_cached: bool, weights: bool, where: str) -> Path | None:
    if Path(model.base).is_absolute():
        if not is_folder(model.base):
            raise InputError(
                f"{where}: there is no folder {model.base}; give a model's folder, or a hub id"
            )
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
            f"{where}: {shown(model.base)} is neither a folder nor a hub id (owner/name); "
            "correct it"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if only_cached:
            return None
        reason = one_line(str(error)).rstrip(".")
        raise InputError(
            f"{where}: cannot fetch {model.base} from the hub: {reason}; "
            "check the name, the network, and $HF_TOKEN for a model with restricted access"
        ) from None
    return Path(folder)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide how a model's tokenizer works, sorted."""
    return sorted(
        file for file in folder.iterdir() if file.is_file() and is_tokenizer_file(file.name)
    )


def is_tokenizer_file(name: str) -> bool:
    """True for the name of a file that decides how a model's tokenizer works."""
    return _TOKENIZER_FILE.fullmatch(name) is not None


def processor_files(folder: Path) -> list[Path]:
    """The files that say how images, videos and sounds become a model's inputs, sorted."""
    return sorted(
        file for file in folder.iterdir() if _PROCESSOR_FILE.fullmatch(file.name) is not None
    )


def has_vocabulary(folder: Path) -> bool:
    """True if a folder holds a tokenizer."""
    return any(_VOCABULARY_FILE.fullmatch(file.name) for file in folder.iterdir())
