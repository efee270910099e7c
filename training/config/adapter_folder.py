"""Finds the adapter that a run starts from, and checks that it fits the recipe; without torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError, reason
from .base_digest import ADDED, BASE_FILE, base_digest, is_same_base
from .models import Head, ModelSettings
from .paths import is_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TOKENIZER = "tokenizer.json"
RESULT_FOLDER = "adapter"
"""Folder of the trained adapter inside a run's folder."""

TASKS = {"causal": "CAUSAL_LM", "score": "SEQ_CLS"}
"""PEFT's task type for each head of a model."""

# Other initialisations change the base model again each time the adapter is loaded.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", None)


def find_adapter(places: Sequence[str]) -> str:
    """The adapter's folder: the first place that exists, or `adapter/` inside it (a run's folder).

    Raises:
        InputError: none of the places is a local folder with an adapter.
    """
    tried = list(dict.fromkeys(places))
    existing = [place for place in tried if "://" not in place and is_folder(place)]
    for place in existing:
        for folder in (Path(place), Path(place) / RESULT_FOLDER):
            if (folder / CONFIG_FILE).is_file():
                return str(folder)
    if existing:
        raise InputError(
            f"model.adapter: {existing[0]} holds no adapter: neither it nor its {RESULT_FOLDER}/, "
            f"which a run writes when it finishes, contains {CONFIG_FILE}; give "
            "another folder, or finish that run"
        )
    raise InputError(
        f"model.adapter: there is no such folder on this machine: {', '.join(tried)}; give the "
        "folder of a run or of a PEFT adapter"
    )


def check_adapter(model: ModelSettings, head: Head) -> None:
    """Check that the run can start from its adapter.

    Raises:
        InputError: the adapter has no safetensors, is not LoRA, or belongs to a model with another
            head or to another base than `model.base`.
    """
    assert model.adapter is not None
    folder = Path(model.adapter)
    config = read_adapter_config(folder, "model.adapter")
    check_safetensors(folder, "model.adapter")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"model.adapter: {folder} holds an adapter of type {config.get('peft_type')}; only "
            "LORA adapters can be trained further; give one of those"
        )
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InputError(
            f"model.adapter: {folder} was saved with init_lora_weights {init!r}, which changes the "
            "base; save it converted to a plain LoRA adapter (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    task = config.get("task_type")
    if task not in (TASKS["causal"], TASKS[head]):
        raise InputError(
            f"model.adapter: {folder} was trained for task {task}; this method needs one for "
            + " or ".join(dict.fromkeys([TASKS["causal"], TASKS[head]]))
        )
    _check_base(model, folder, str(config.get("base_model_name_or_path")))


def added_tokens(folder: Path) -> list[str]:
    """The tokens that came with an adapter: finray notes them, and PEFT the rows that it trains.

    Raises:
        InputError: a file cannot be read.
    """
    where = "model.adapter"
    noted = _read(folder / BASE_FILE, where) if (folder / BASE_FILE).is_file() else {}
    if ADDED in noted:
        return list(noted[ADDED])
    ids = trained_rows(read_adapter_config(folder, where))
    if not ids or not (folder / _TOKENIZER).is_file():
        return []
    tokenizer = _read(folder / _TOKENIZER, where)
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    return [names[index] for index in ids]


def trained_rows(config: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens whose rows an adapter trains, from PEFT's configuration of it."""
    rows = config.get("trainable_token_indices") or []
    parts = rows.values() if isinstance(rows, dict) else [rows]
    return sorted({index for part in parts for index in part})


def check_for_vllm(model: ModelSettings) -> None:
    """Check that vLLM applies the adapter in the same way as PEFT.

    Raises:
        InputError: the adapter uses settings that vLLM does not support.
    """
    assert model.adapter is not None
    unsupported = unknown_to_vllm(read_adapter_config(Path(model.adapter), "model.adapter"))
    if unsupported:
        raise InputError(
            f"method.rollout: vLLM does not support {', '.join(unsupported)} of the adapter "
            f"{model.adapter}; set method.rollout: transformers"
        )


def unknown_to_vllm(config: Mapping[str, Any]) -> list[str]:
    """The settings of an adapter that vLLM does not apply, from PEFT's configuration of it."""
    names = (
        *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"),
        *("target_parameters", "trainable_token_indices"),
    )
    return [name for name in names if config.get(name)]


def check_safetensors(folder: Path, where: str) -> None:
    """Check that an adapter has safetensors; PEFT would otherwise read pickled weights.

    Raises:
        InputError: the folder holds no safetensors.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{where}: {folder} has no {WEIGHTS_FILE}; pickled weights can run code, so they are "
            "not read; save the adapter with safe_serialization=True"
        )


def _check_base(model: ModelSettings, folder: Path, name: str) -> None:
    where = "model.adapter"
    if not is_same_base(model, name, recorded_digest(folder, where)):
        raise InputError(
            f"{where}: {folder} is an adapter of {name}, and model.base is {model.base}, "
            "which has other weights; set model.base to the adapter's base (if that has moved, "
            f"write its new path into {CONFIG_FILE})"
        )


def is_base_unchanged(adapter: Path, base: Path, where: str) -> bool:
    """False if a base's weights have changed since an adapter was trained on it.

    Raises:
        InputError: base.json or a weight file cannot be read.
    """
    recorded = recorded_digest(adapter, where)
    return recorded is None or base_digest(base) in (recorded, None)


def recorded_digest(adapter: Path, where: str) -> Any:
    """The digest of an adapter's base from base.json; None if there is none.

    Raises:
        InputError: the file cannot be read; `where` is the key in the recipe.
    """
    file = adapter / BASE_FILE
    return _read(file, where).get("digest") if file.is_file() else None


def read_adapter_config(folder: Path, where: str) -> dict[str, Any]:
    """PEFT's configuration of an adapter.

    Raises:
        InputError: it cannot be read; `where` is the key in the recipe.
    """
    return _read(folder / CONFIG_FILE, where)


def adapter_base(folder: Path, head: Head, where: str) -> tuple[str, str | None]:
    """The name and the revision of the base that a finished adapter belongs to.

    Raises:
        InputError: the adapter's model has another head, or it names no base.
    """
    config = read_adapter_config(folder, where)
    task, base, revision = (
        config.get(name) for name in ("task_type", "base_model_name_or_path", "revision")
    )
    if task != TASKS[head]:
        raise InputError(
            f"{where}: {folder} is an adapter for the task {task}; expected one for {TASKS[head]}"
        )
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{where}: {folder / CONFIG_FILE} has no base_model_name_or_path; write the base there"
        )
    return base, revision if isinstance(revision, str) else None


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{where}: cannot read {path}: {reason(error)}; save the adapter again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: {path} is not a JSON object; save it again")
    return content
