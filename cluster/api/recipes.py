"""A recipe or a sweep as a caller gives it: a file, a mapping, or a loaded recipe."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...training.common.errors import InputError
from ...training.common.formatting import shown
from ...training.config.recipe import Recipe
from ...training.config.recipe import load_recipe as load
from ...training.config.yaml_file import Change
from ..environment import quiet_libraries, set_environment

RecipeSource = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A YAML file, the settings as a mapping (their paths are relative to the current folder), or a
recipe that is loaded already."""
SweepSource = str | os.PathLike[str] | Mapping[str, Any]
"""A sweep's YAML file, or its settings as a mapping."""
Changes = Mapping[str, Any] | Sequence[str]
"""Values by dotted key, or texts as `--set` takes them: `optim.learning_rate=1e-4`."""

LOCAL = ("scale.workers=0", "scale.strategy=auto")
"""The changes that make a run train in this process."""


def prepare_process() -> None:
    """Set the environment that libraries read when they are loaded."""
    set_environment()
    quiet_libraries()


def load_recipe(recipe: RecipeSource, changes: Changes = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: a YAML file, or the settings as a mapping. Input paths are relative to the file's
            folder, or to the current one.
        changes: values that override the recipe's, by dotted key, such as
            `{"optim.learning_rate": 1e-4}`.

    Raises:
        InputError: with place and key of every fault.
    """
    prepare_process()
    return read(recipe, changes)


def read(recipe: RecipeSource, changes: Changes, *, local: bool = False) -> Recipe:
    """As `load_recipe`; `local` makes the run train in this process."""
    all_changes = [*as_changes(changes), *(LOCAL if local else ())]
    if isinstance(recipe, Recipe) and not all_changes:
        return recipe
    return load(source_of(recipe), all_changes)


def as_changes(changes: Changes) -> list[str | Change]:
    """Changes in the form that recipes and sweeps take.

    Raises:
        InputError: they are neither a mapping nor texts.
    """
    if not isinstance(changes, Mapping):
        if not isinstance(changes, list | tuple) or not all(isinstance(c, str) for c in changes):
            raise InputError(
                "changes: expected a mapping by dotted key, or a list of 'key=value' texts; found "
                f"{shown(changes)}"
            )
        return list(changes)
    if wrong := [key for key in changes if not isinstance(key, str)]:
        raise InputError(f"changes: the key {shown(wrong[0])} is not text; write 'optim.epochs'")
    return [Change(key, value, "changes") for key, value in changes.items()]


def source_of(recipe: RecipeSource | SweepSource) -> Path | Mapping[str, Any]:
    """A path, or the settings as a mapping."""
    if isinstance(recipe, Recipe):
        # Unset fields stay unset: written defaults could contradict a change.
        values = recipe.model_dump(mode="json", exclude_unset=True)
        return {**values, "method": {"kind": recipe.method.kind, **values.get("method", {})}}
    if isinstance(recipe, Mapping):
        return recipe
    return Path(recipe) if isinstance(recipe, str | os.PathLike) else recipe
