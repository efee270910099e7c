"""Checks the weights of a model's or adapter's folder by their headers, before torch is loaded.

The files must be whole, and agree with config.json in the sizes of the embedding and in the number
of layers. Whether every tensor has its place is known once the model is built (models/pretrained).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.storage import Folder
from .adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from .adapter_folder import WEIGHTS_FILE, adapter_base, check_safetensors
from .model_folder import model_folder, named_model
from .models import Head, ModelSettings
from .weight_files import INDEX_FILE, SINGLE_FILE, StoredTensor, read_header, read_weights

_CONFIG = "config.json"
_EMBEDDING = re.compile(r"(.*\.|)(embed_tokens|wte|embed_in|word_embeddings)\.weight")
_WHOLE_TYPES = ("F32", "F16", "BF16", "F64")
_UNIFORM = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite"}
    | {"olmo2", "smollm3", "gpt2", "gpt_neox", "starcoder2", "stablelm"}
)
"""Types of models whose layers all hold the same tensors."""


def check_base_weights(model: ModelSettings, head: Head) -> None:
    """Check the weights of `model.base`, as far as they are on this machine.

    Raises:
        InputError: see `check_model_weights`.
    """
    folder = model_folder(model, only_cached=True)
    if folder is not None and _is_complete(folder, model):
        check_model_weights(Folder(str(folder)), head, "model.base", new_head=True)


def embedding_rows(model: ModelSettings) -> int | None:
    """Rows of the embedding of `model.base`; None where this machine does not hold its files.

    Raises:
        InputError: the configuration or a file's header cannot be read.
    """
    folder = model_folder(model, only_cached=True)
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    try:
        return _rows(Folder(str(folder.absolute())), weights_here(folder))
    except InputError as error:
        raise InputError(f"model.base: {error}") from None


def _rows(folder: Folder, has_weights: bool) -> int | None:
    embedding = _embedding_of(read_weights(folder)) if has_weights else None
    if embedding is not None and embedding[1].dtype in _WHOLE_TYPES:
        return embedding[1].shape[0]
    size = text_part(_config(folder)).get("vocab_size")
    return size if isinstance(size, int) else None


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model, which may be one of several parts."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _embedding_of(tensors: Mapping[str, StoredTensor]) -> tuple[str, StoredTensor] | None:
    names = [name for name in tensors if _EMBEDDING.fullmatch(name)]
    name = min(names, key=len, default=None)
    return None if name is None else (name, tensors[name])


def weights_here(folder: Path) -> bool:
    """True if a model's folder holds weights."""
    return any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def check_named_weights(name: str, head: Head, where: str) -> None:
    """Check the weights of a model that a recipe names: an adapter and its base, or a whole model.

    Args:
        name: folder or hub id.
        head: causal for a language model, score for a sequence classifier.
        where: the key in the recipe, for messages.

    Raises:
        InputError: see `check_model_weights` and `check_adapter_weights`.
    """
    model = named_model(name)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        check_adapter_weights(Path(name), where)
        base, revision = adapter_base(Path(name), head, where)
        model = ModelSettings(base=base, revision=revision)
    folder = model_folder(model, only_cached=True, where=where)
    if folder is not None and _is_complete(folder, model):
        check_model_weights(Folder(str(folder)), head, where, new_head=model.base != name)


def _is_complete(folder: Path, model: ModelSettings) -> bool:
    """False for a hub model of which this machine holds the small files only."""
    is_local = Path(model.base).is_absolute()
    return is_local or weights_here(folder)


def check_adapter_weights(folder: Path, where: str) -> None:
    """Check the weights of a LoRA adapter.

    Raises:
        InputError: the file is missing, damaged or empty, or a pair of matrices is incomplete.
    """
    check_safetensors(folder, where)
    file = folder / WEIGHTS_FILE
    try:
        tensors = read_header(Folder(str(folder.absolute())), WEIGHTS_FILE)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not tensors:
        raise InputError(f"{where}: {file}: holds no tensors; save the adapter again")
    for name, entry in tensors.items():
        if ".lora_A." in name and entry.shape:
            partner = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if partner is None or partner.shape[1:2] != entry.shape[:1]:
                raise InputError(
                    f"{where}: {file}: {name} has no lora_B of its rank; save the adapter again"
                )


def check_result_weights(folder: Folder, kind: str, where: str) -> None:
    """Check the weights of a reward model that a run trained, where they are on this machine.

    Args:
        folder: the run's result.
        kind: adapter or model.
        where: the key in the recipe, for messages.

    Raises:
        InputError: see `check_model_weights` and `check_adapter_weights`.
    """
    if folder.local is None:
        return
    if kind == "adapter":
        check_adapter_weights(folder.local, where)
    else:
        check_model_weights(folder, "score", where, new_head=False)


def check_model_weights(folder: Folder, head: Head, where: str, *, new_head: bool) -> None:
    """Check the weights of a whole model.

    Args:
        folder: the model's folder.
        head: causal for a language model, score for a sequence classifier.
        where: the key in the recipe, for messages.
        new_head: True if a score head may be missing, because it is new or comes from an adapter.

    Raises:
        InputError: a file is missing, empty, damaged or not in the safetensors format, the shapes
            contradict config.json, or the model is of another kind.
    """
    try:
        tensors = read_weights(folder)
        config = _config(folder)
        _check_kind(tensors, config, folder, head, new_head)
        _check_sizes(tensors, config, folder)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _config(folder: Folder) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(_CONFIG))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _CONFIG}: cannot be read: {error}; save it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{folder / _CONFIG}: expected a JSON object; save it again")
    return content


def _check_kind(
    tensors: Mapping[str, StoredTensor],
    config: dict[str, Any],
    folder: Folder,
    head: Head,
    new_head: bool,
) -> None:
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    is_classifier = architecture.endswith("ForSequenceClassification")
    if head == "causal" and (is_classifier or "score.weight" in tensors):
        raise InputError(
            f"{folder}: a classifier, such as a reward model, instead of a language model; give "
            "the language model that it was trained from"
        )
    if head == "score" and architecture and not is_classifier and not new_head:
        raise InputError(
            f"{folder}: a {architecture} without a classifier's head; give a sequence classifier"
        )


_EMBEDDING_WIDTHS = (
    *("word_embed_proj_dim", "embedding_size", "input_embedding_size"),
    *("hidden_size", "n_embd"),
)
"""Fields with an embedding's width; the first that is given counts."""
_MORE_ROWS = {"mllama_text_model": 8, "moshi": 1}
"""Rows of the embedding beyond the vocabulary, for marks of pictures and of a start."""


def _check_sizes(
    tensors: Mapping[str, StoredTensor], config: dict[str, Any], folder: Folder
) -> None:
    sizes, stored = text_part(config), _embedding_of(tensors)
    if stored is None:
        return
    embedding, entry = stored
    width = next((sizes[name] for name in _EMBEDDING_WIDTHS if sizes.get(name)), None)
    rows = sizes.get("vocab_size")
    if isinstance(rows, int):
        rows += _MORE_ROWS.get(str(sizes.get("model_type")), 0)
    expected = (("vocab_size", rows), ("hidden_size", width))
    if entry.dtype in _WHOLE_TYPES and len(entry.shape) == 2:
        for (key, size), actual in zip(expected, entry.shape, strict=True):
            if isinstance(size, int) and size != actual:
                raise InputError(
                    f"{folder / _CONFIG}: {key} is {size}, but {embedding} is stored as "
                    f"{list(entry.shape)}; the configuration belongs to another model"
                )
    prefix = embedding.rpartition(".")[0].rpartition(".")[0]
    _check_layers(tensors, sizes, folder, f"{prefix}." if prefix else "")


def _check_layers(
    tensors: Mapping[str, StoredTensor], sizes: dict[str, Any], folder: Folder, prefix: str
) -> None:
    """Check the decoder layers, which lie beside the embedding."""
    pattern = re.compile(rf"({re.escape(prefix)}(?:layers|h)\.)(\d+)\.(.+)")
    layers: dict[int, set[str]] = {}
    container = ""
    for match in filter(None, map(pattern.fullmatch, tensors)):
        container = match[1]
        layers.setdefault(int(match[2]), set()).add(match[3])
    count = sizes.get("num_hidden_layers") or sizes.get("n_layer")
    if not layers or not isinstance(count, int):
        return
    absent = [number for number in range(count) if number not in layers]
    if absent:
        raise InputError(
            f"{folder}: the weights lack layer {absent[0]} ({len(absent)} in all): config.json "
            f"says num_hidden_layers {count}, and they hold {len(layers)}; download or save the "
            "model again"
        )
    common = set().union(*layers.values()) if sizes.get("model_type") in _UNIFORM else set()
    lacking = [f"{container}{n}.{name}" for n in range(count) for name in common - layers[n]]
    if lacking:
        raise InputError(
            f"{folder}: the weights lack {min(lacking)} ({len(lacking)} in all), which other "
            "layers have; download or save the model again"
        )
