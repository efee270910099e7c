"""Python code that comes with a model runs only where the recipe says so, at a pinned commit."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .models import ModelSettings

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CURE = (
    "look at that code, and set model.trust_remote_code: true if you trust it (for a hub model "
    "together with model.revision, the full hash of a commit)"
)
_OTHER = "choose a model that transformers has"


def is_commit(revision: str | None) -> bool:
    """True for the full hash of a commit, which always means the same files."""
    return _COMMIT.fullmatch(revision or "") is not None


def check_pinned(model: ModelSettings) -> None:
    """Refuse code that its author could change between two runs.

    Raises:
        InputError: the code of a hub model is trusted without the full hash of a commit.
    """
    is_hub_model = not Path(model.base).is_absolute()
    if model.trust_remote_code and is_hub_model and not is_commit(model.revision):
        raise InputError(
            f"model.trust_remote_code: {model.base} could change its code at any time; set "
            f"model.revision to the full hash of a commit (40 hex digits), not {model.revision!r}"
        )


def check_remote_code(model: ModelSettings, folder: Path, where: str = "model.base") -> None:
    """Refuse a model that transformers can only load by the code in its folder.

    A model that transformers knows is loaded by transformers' own code, whatever its folder holds.
    Trusted code lies beside the model: other repositories' is not pinned by the revision.

    Args:
        model: the model's settings; only a recipe's own base can be trusted.
        folder: its files.
        where: the key in the recipe, for messages.

    Raises:
        InputError: naming the file and what it asks for.
    """
    config = _read(folder / "config.json")
    tokenizer = _read(folder / "tokenizer_config.json")
    if "auto_map" not in config and "auto_map" not in tokenizer:
        return  # most; transformers takes long to import
    needs = {
        "config.json": not _is_in_transformers(config.get("model_type")),
        "tokenizer_config.json": not (folder / "tokenizer.json").exists(),
    }
    for file, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        named = json.dumps(content.get("auto_map") or {})
        if model.trust_remote_code and "--" in named:
            raise InputError(
                f"{where}: {folder / file}: auto_map refers to code of another repository "
                f"({named}), which model.revision does not pin; copy model and code into a folder"
            )
        if not model.trust_remote_code and named != "{}" and needs[file]:
            raise InputError(
                f"{where}: {folder / file}: auto_map refers to the model's own Python code "
                f"({named}), which is not run; {_CURE if where == 'model.base' else _OTHER}"
            )


def code_files(model: ModelSettings) -> dict[str, str]:
    """The Python files in a trusted folder, by SHA-256 in hex; a hub model's are pinned."""
    folder = Path(model.base)
    if not model.trust_remote_code or not folder.is_absolute():
        return {}
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.py"))
    }


def _is_in_transformers(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, which other checks report."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
