"""Every YAML that ships is a valid recipe."""

from pathlib import Path

import pytest

from finray.training.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).name
