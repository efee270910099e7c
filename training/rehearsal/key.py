"""The key of a rehearsal: recipes with the same key have the same outcome.

It is a hash of all that the outcome depends on: the model's configuration and code, the settings of
model, adapter and method, and the libraries. Of most numbers it does not: a rank is cut down in a
small copy, and a learning rate is not used.
"""

import hashlib
import importlib.util
import json
import re
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..common.storage import Folder
from ..common.versions import installed_versions
from ..config.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from ..config.adapter_folder import WEIGHTS_FILE
from ..config.models import LoraAdapter
from ..config.recipe import Recipe
from ..config.weight_checks import embedding_rows
from ..config.weight_files import read_header

_SCALE = re.compile(r'"floor_scale": *(\d+)')
_USUAL_SCALE = "8192"
RANK = 4
"""Largest rank in a small copy."""
_VERSION = 9
"""Increase it when the same recipe would have another outcome."""
_KERNELS = ("causal_conv1d", "mamba_ssm", "fla")
_UNIMPORTANT = ("base", "revision", "dtype")
"""Settings of the model that a small copy in float32 does not have."""


def key_of(recipe: Recipe, folder: Path) -> str:
    """The key of a recipe's rehearsal, 16 hexadecimal digits.

    Args:
        recipe: the recipe, its paths absolute.
        folder: its model's folder, which holds at least the configuration.
    """
    model = recipe.model.model_dump(mode="json", exclude=set(_UNIMPORTANT))
    if recipe.model.adapter is not None:
        folder_of_adapter = Path(recipe.model.adapter)
        header = read_header(Folder(str(folder_of_adapter)), WEIGHTS_FILE)
        model["adapter"] = [
            (folder_of_adapter / ADAPTER_CONFIG).read_text("utf-8"),
            {name: entry.shape for name, entry in header.items()},
        ]
    adapter, method = recipe.adapter, recipe.method
    facts: dict[str, Any] = {
        "version": _VERSION,
        **_libraries(),
        "config": (config := (folder / "config.json").read_text("utf-8")),
        "scaled": [recipe.data.max_length >= size for size in _scaling_lengths(config)],
        "code": _code(folder) if recipe.model.trust_remote_code else None,
        "model": model,
        "tokens": _added(recipe, folder) if recipe.model.add_tokens else None,
        "adapter": None if adapter is None else _coarse(adapter),
        "freeze": None if recipe.freeze is None else recipe.freeze.model_dump(mode="json"),
        "method": _signs(method.model_dump(mode="json", exclude={"rewards", "reference_model"})),
        "packing": recipe.data.packing is False,
        "sharded": recipe.scale.strategy == "fsdp",
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _scaling_lengths(config: str) -> list[int]:
    """Tokens of a row from which on some layers compute otherwise (Llama 4).

    Args:
        config: text of config.json, which may leave out the usual value.
    """
    return [int(size) for size in _SCALE.findall(config) or [_USUAL_SCALE]]


@lru_cache(maxsize=1)
def _libraries() -> dict[str, Any]:
    """What is installed; it is looked up once, as a sweep asks for the keys of many settings."""
    return {
        "versions": {**installed_versions(), "bitsandbytes": version("bitsandbytes")},
        "kernels": [name for name in _KERNELS if importlib.util.find_spec(name) is not None],
    }


def cut_down(adapter: LoraAdapter) -> LoraAdapter:
    """The adapter for a small copy: of small ranks, in float32."""
    ranks = {name: min(rank, RANK) for name, rank in adapter.rank_pattern.items()}
    changes = {"rank": min(adapter.rank, RANK), "rank_pattern": ranks, "dtype": "float32"}
    return adapter.model_copy(update=changes)


def _coarse(adapter: LoraAdapter) -> dict[str, Any]:
    """An adapter's settings without its sizes."""
    values = adapter.model_dump(mode="json", exclude={"rank", "alpha", "dtype"})
    patterns = {name: sorted(values[name]) for name in ("rank_pattern", "alpha_pattern")}
    return {**_signs(values), **patterns}


def _signs(values: dict[str, Any]) -> dict[str, Any]:
    """With 0, 1 or -1 in place of every fraction, such as a dropout or a beta: 0 may turn
    something off, and other values do the same as each other."""
    return {
        name: (value > 0) - (value < 0) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _added(recipe: Recipe, folder: Path) -> list[Any]:
    """What decides which tokens are added, and whether the embedding has rows for them."""
    files = sorted({*folder.glob("*token*"), *folder.glob("chat_template*")})
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return [digests, recipe.data.chat_template, embedding_rows(recipe.model)]


def _code(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.py"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
