"""Every YAML that ships is a valid recipe or sweep."""

from pathlib import Path

import pytest

from finray.training.config.recipe import load_recipe
from finray.tuning.plan import make_plan
from finray.tuning.sweep import load_sweep

YAMLS = sorted((Path(__file__).resolve().parents[3] / "recipes").rglob("*.yaml"))
SWEEPS = [path for path in YAMLS if path.name.startswith("tune")]
RECIPES = [path for path in YAMLS if path not in SWEEPS]


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_valid(path: Path, tmp_path: Path) -> None:
    # What some of them start from is the result of others.
    (tmp_path / "quickstart-reward").mkdir()
    start = tmp_path / "quickstart-start" / "adapter"
    start.mkdir(parents=True)
    (start / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert load_recipe(path, (f"storage={tmp_path}",)).name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_shipped_sweep_is_valid(path: Path) -> None:
    plan = make_plan(load_sweep(path))
    assert plan.space.searched and not plan.excluded_count
