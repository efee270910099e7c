"""The frozen base of a run, kept for the next run of the same process.

A sweep's trials train adapters beside the same base one after the other. An adapter is taken off
as PEFT does it, and the next one finds the base as it was: it is frozen, so no run changes it.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

Measures = dict[str, float]

_wanted = threading.Event()
_kept: "dict[str, PeftModel]" = {}
_measured: dict[str, Measures] = {}


def keep_bases() -> None:
    """From now on this process keeps the last base that a run loaded."""
    _wanted.set()


def forget_bases() -> None:
    """Keep nothing, as at the start."""
    _wanted.clear()
    _kept.clear()
    _measured.clear()


def take_base(recipe: Recipe) -> Any | None:
    """The kept base where it is the recipe's, without its last adapter; None for another."""
    found = _kept.pop(_key(recipe), None)
    _kept.clear()  # one at a time: two may not fit
    return None if found is None else found.unload()


def put_base(recipe: Recipe, model: "PeftModel") -> None:
    """Note whose base the next run may have, where the adapter leaves it as it is."""
    if _leaves_base(recipe):
        _kept[_key(recipe)] = model


def measured_before(recipe: Recipe, prepared: str, measure: Callable[[], Measures]) -> Measures:
    """What a run measures before its first step; of a base that is kept it is measured once.

    Args:
        recipe: the run's.
        prepared: fingerprint of its data.
        measure: called where nothing is known.
    """
    if not _leaves_base(recipe):
        return measure()
    # The seed, as online methods sample what they measure.
    key = f"{_key(recipe)} {recipe.method.model_dump_json()} {recipe.seed} {prepared}"
    if key not in _measured:
        _measured[key] = measure()
    return dict(_measured[key])


def _leaves_base(recipe: Recipe) -> bool:
    """Whether the base is wanted, and a new adapter neither changes it nor what it answers."""
    adapter = recipe.adapter
    return (
        _wanted.is_set()
        and adapter is not None
        and adapter.init in ("default", "gaussian", "orthogonal")
        and not adapter.modules_to_save
    )


def _key(recipe: Recipe) -> str:
    return recipe.model.model_dump_json()
