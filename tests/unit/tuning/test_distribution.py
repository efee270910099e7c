"""The values of a distribution, and that each of them has one spelling."""

from pathlib import Path

import optuna
import pytest

from finray.training.config.recipe import Recipe
from finray.tuning.combinations import Combinations
from finray.tuning.distribution import Distribution
from finray.tuning.space import Space


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (Distribution(uniform=(0.0, 0.3), step=0.1), [0.0, 0.1, 0.2, 0.3]),
        (Distribution(uniform=(0.1, 0.35), step=0.1), [0.1, 0.2, 0.3]),
        (Distribution(uniform=(0.0, 1.0), step=0.6), [0.0, 0.6]),
        (Distribution(int_uniform=(1, 12), step=4), [1, 5, 9]),
        (Distribution(int_uniform=(1, 3)), [1, 2, 3]),
        (Distribution(log_int_uniform=(2, 5)), [2, 3, 4, 5]),
    ],
)
def test_a_grid_ends_with_its_last_whole_step(
    distribution: Distribution, values: list[float]
) -> None:
    assert distribution.every_value() == values
    assert distribution.bounds == (values[0], values[-1])
    assert distribution.nearest(99) == values[-1] and distribution.contains(values[-1])
    assert not distribution.contains(values[-1] + 0.05)


@pytest.mark.parametrize("kind", ["grid", "choice"])
def test_every_suggested_value_has_prepared_data(kind: str) -> None:
    """0.1 + 2 * 0.1 is not 0.3, and a recipe's 0.0 is the choice 0: they are one setting."""
    data = {"train": [{"path": "/x"}]}
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "owner/model"}, "data": data})
    holdout = Distribution(uniform=(0.0, 0.3), step=0.1)
    if kind == "choice":
        holdout = Distribution(choice=[0, 0.1])
    space = Space({"data.holdout": holdout}, recipe, Path("/"), lambda key: key)
    combinations = Combinations(space)
    prepared = {combinations.data_key(settings) for settings in combinations.data_settings()}
    assert len(prepared) == len(holdout.every_value() or [])
    assert combinations.data_key(space.rule_of_thumb()) in prepared
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    suggested = {combinations.data_key(space.suggest(study.ask())) for _ in range(40)}
    assert suggested == prepared
