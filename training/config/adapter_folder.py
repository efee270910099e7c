"""An adapter that a run starts from: where it is, and whether it fits; without torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .base_digest import BASE_FILE, is_same_base
from .models import Head, ModelSettings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RESULT_FOLDER = "adapter"
"""Inside a run's folder."""

TASKS = {"causal": "CAUSAL_LM", "score": "SEQ_CLS"}
"""PEFT's task type of a model with each head."""

# Others would take their first values out of the base anew whenever the adapter is loaded.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", None)


def find_adapter(places: Sequence[str]) -> str:
    """The adapter's folder: the first place that exists, or `adapter/` inside it (a run's folder).

    Raises:
        InputError: naming the places, where none is a folder on a disk with an adapter.
    """
    tried = list(dict.fromkeys(places))
    existing = [place for place in tried if "://" not in place and Path(place).is_dir()]
    for place in existing:
        for folder in (Path(place), Path(place) / RESULT_FOLDER):
            if (folder / CONFIG_FILE).is_file():
                return str(folder)
    if existing:
        raise InputError(
            f"model.adapter: {existing[0]} holds no adapter: there is no {CONFIG_FILE} in it or in "
            f"its {RESULT_FOLDER}/, which a run writes when it finishes"
        )
    raise InputError(
        f"model.adapter: there is no such folder on a disk: {', '.join(tried)}; give a run's "
        "folder, or one that PEFT wrote"
    )


def check_adapter(model: ModelSettings, head: Head) -> None:
    """Refuse an adapter that the run cannot start from.

    Raises:
        InputError: it is not whole, of another kind, of a model with another head, or of another
            base than `model.base`.
    """
    assert model.adapter is not None
    folder = Path(model.adapter)
    config = _read(folder / CONFIG_FILE)
    check_safetensors(folder, "model.adapter")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"model.adapter: {folder} holds an adapter of type {config.get('peft_type')}; LORA is "
            "what can be trained further"
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
            f"model.adapter: {folder} was trained for task {task}; this method starts from one for "
            + " or ".join(dict.fromkeys([TASKS["causal"], TASKS[head]]))
        )
    _check_base(model, folder, str(config.get("base_model_name_or_path")))


def check_for_vllm(model: ModelSettings) -> None:
    """Refuse an adapter that vLLM would apply in another way than it is trained.

    Raises:
        InputError: naming what of it vLLM does not know.
    """
    assert model.adapter is not None
    config = _read(Path(model.adapter) / CONFIG_FILE)
    names = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    unknown = [name for name in names if config.get(name)]
    if unknown:
        raise InputError(
            f"method.rollout: vLLM does not know {', '.join(unknown)} of the adapter "
            f"{model.adapter}; set method.rollout: transformers"
        )


def check_safetensors(folder: Path, where: str) -> None:
    """PEFT would read pickled weights where there are no others.

    Raises:
        InputError: an adapter's folder holds no safetensors.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{where}: {folder} has no {WEIGHTS_FILE}; weights in other files, which are pickled "
            "and can run code, are not read"
        )


def _check_base(model: ModelSettings, folder: Path, named: str) -> None:
    noted = _read(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else {}
    if not is_same_base(model, named, noted.get("digest")):
        raise InputError(
            f"model.adapter: {folder} is an adapter of {named}, and model.base is {model.base}, "
            "whose weights are others; set model.base to the adapter's own (if it has only moved, "
            f"write its new name into {CONFIG_FILE})"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model.adapter: cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"model.adapter: {path} is not a JSON object")
    return content
