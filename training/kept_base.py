"""The frozen base of a run, kept for the next run of the same process.

A sweep's trials train adapters beside the same base one after the other. An adapter is taken off
as PEFT does it, and the next one finds the base as it was: it is frozen, so no run changes it.
"""

import threading
from typing import Any

from peft import PeftModel

from .recipe import Recipe

_wanted = threading.Event()
_kept: dict[str, PeftModel] = {}


def keep_bases() -> None:
    """From now on this process keeps the last base that a run loaded."""
    _wanted.set()


def forget_bases() -> None:
    """Keep nothing, as at the start."""
    _wanted.clear()
    _kept.clear()


def take_base(recipe: Recipe) -> Any | None:
    """The kept base where it is the recipe's, without its last adapter; None for another."""
    found = _kept.pop(_key(recipe), None)
    _kept.clear()  # one at a time: two may not fit
    return None if found is None else found.unload()


def put_base(recipe: Recipe, model: PeftModel) -> None:
    """Note whose base the next run may have, where the adapter leaves it as it is."""
    adapter = recipe.adapter
    if not _wanted.is_set() or adapter is None:
        return
    if adapter.init in ("default", "gaussian", "orthogonal") and not adapter.modules_to_save:
        _kept[_key(recipe)] = model


def _key(recipe: Recipe) -> str:
    return recipe.model.model_dump_json()
