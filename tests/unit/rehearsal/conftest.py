"""Recipes on tiny architectures; nothing here needs weights, as the rehearsal draws its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from finray.training.config.recipe import Recipe
from finray.training.rehearsal.outcome import Outcome
from finray.training.rehearsal.rehearse import rehearse_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """A recipe on a model of some kind, of the size that transformers gives it."""

    def make(kind: str, config: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        folder = tmp_path / "base"
        AutoConfig.for_model(kind, **(config or {})).save_pretrained(folder)
        values = {
            "name": "x",
            "model": {"base": str(folder)},
            "adapter": {"rank": 8},
            "data": {"train": [{"path": "/x"}]},
            "storage": str(tmp_path / "runs"),
            **sections,
        }
        return Recipe.model_validate({k: v for k, v in values.items() if v is not None})

    return make


@pytest.fixture
def rehearsed(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Outcome]:
    """The outcome of a rehearsal in this process."""

    def run(
        kind: str,
        config: dict[str, Any] | None = None,
        *,
        scratch: str = "scratch",
        **sections: Any,
    ) -> Outcome:
        recipe = make_recipe(kind, config, **sections)
        folder = tmp_path / scratch
        folder.mkdir()
        return rehearse_recipe(recipe, folder)

    return run
