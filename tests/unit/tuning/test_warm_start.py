"""Which results of an earlier sweep a new one starts with, and with which settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FixedTrial, TrialState

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.config.recipe import Recipe
from finray.tuning.distribution import Distribution, Settings
from finray.tuning.plan import make_plan
from finray.tuning.space import Space
from finray.tuning.study import StudyFile, SweepStudy
from finray.tuning.sweep import load_sweep
from finray.tuning.sweep_folder import write_sweep
from finray.tuning.warm_start import earlier_trials

METRICS = [Metric("eval_loss", "min")]
RATE, RANK, ALPHA = "optim.learning_rate", "adapter.rank", "adapter.alpha"
AT_ALPHA = Distribution(log_uniform=(1e-9, 10.0), at_alpha=32)
SEARCH = {RATE: Distribution(log_uniform=(1e-5, 1e-1)), RANK: Distribution(choice=[2, 4])}
MakeSpace = Callable[..., Space]


@pytest.fixture
def make(tiny_model: Path) -> MakeSpace:
    """A space around a small recipe; keyword arguments change its adapter."""

    def space(search: dict[str, Distribution], **adapter: Any) -> Space:
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "model": {"base": str(tiny_model)},
                "adapter": {"rank": 2, "alpha": 8, **adapter},
                "data": {"train": [{"path": "/x"}], "holdout": 0.1},
            }
        )
        return Space(search, recipe, Path("/"), lambda key: key)

    return space


def studied(space: Space, folder: Path | None, *points: Settings) -> SweepStudy:
    """A finished sweep over the points, with losses 1, 2, and so on."""
    storage: Any = optuna.storages.InMemoryStorage()
    if folder is not None:
        storage = StudyFile(Folder(str(folder))).open()
        record = {
            "settings": {"recipe": space.base.model_dump(mode="json")},
            "objectives": [{"metric": metric.name, "mode": metric.mode} for metric in METRICS],
        }
        write_sweep(Folder(str(folder)), record)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = SweepStudy(storage, "s", METRICS, space, sampler, optuna.pruners.NopPruner())
    study.set_up([space.complete(point) for point in points], [])
    for place, _ in enumerate(points):
        assignment = study.ask()
        assert assignment is not None
        study.finish(assignment.number, {"eval_loss": place + 1.0, "tokens": 900})
    return study


POINTS = [{RATE: 1e-3, RANK: 2}, {RATE: 2e-3, RANK: 4}]


@pytest.fixture
def folder(make: MakeSpace, tmp_path: Path) -> Folder:
    """Folder of a finished sweep over rate and rank, with two trials."""
    studied(make(SEARCH), tmp_path / "before", *POINTS)
    return Folder(str(tmp_path / "before"))


def taken(folder: Folder, space: Space) -> list[Settings]:
    """Settings, in the new space, of the trials that are taken over."""
    trials = earlier_trials(folder, space, METRICS)
    return [space.suggest(FixedTrial(trial.params)) for trial in trials]


def test_results_are_taken_over_once_and_are_not_its_own(folder: Folder, make: MakeSpace) -> None:
    space = make(SEARCH)
    earlier = earlier_trials(folder, space, METRICS)
    after = studied(space, None)
    after.set_up([], earlier)
    after.set_up([], earlier)
    stored = after.optuna.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.value for trial in stored] == [1.0, 2.0]
    assert after.rows() == [] and after.best() == []


@pytest.mark.parametrize("other", [Metric("x", "max"), Metric("loss", "min")])
def test_no_sweep_and_another_objective(
    folder: Folder, make: MakeSpace, tmp_path: Path, other: Metric
) -> None:
    with pytest.raises(InputError, match=r"another objective: eval_loss \(min\)"):
        earlier_trials(folder, make(SEARCH), [other])
    with pytest.raises(InputError, match="holds no sweep"):
        earlier_trials(Folder(str(tmp_path)), make(SEARCH), METRICS)


def test_an_unusable_sweep_is_refused_by_the_plan(
    folder: Folder, tmp_path: Path, tiny_model: Path
) -> None:
    """With its place in the file, before data is prepared; a sweep that has begun needs none."""
    path = tmp_path / "sweep.yaml"
    data = "data: {train: [{path: /x}], holdout: 0.1}"
    path.write_text(
        f"name: s\nstorage: {tmp_path}\nrecipe: {{model: {{base: {tiny_model}}}, {data}}}\n"
        f"objective: loss\nwarm_start:\n  - {folder}\n  - {tmp_path / 'nowhere'}\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError, match=r"sweep\.yaml:6: warm_start\.0: .*another objective"):
        make_plan(load_sweep(path))
    with pytest.raises(InputError, match=r"sweep\.yaml:7: warm_start\.1: .*holds no sweep"):
        make_plan(load_sweep(path, ("objective=eval_loss",)))
    Folder(str(tmp_path / "s")).create().write("optuna.db", b"")
    assert make_plan(load_sweep(path)).metrics == [Metric("loss", "min")]


def test_trials_outside_the_space_are_left_out(folder: Folder, make: MakeSpace) -> None:
    assert taken(folder, make({**SEARCH, RATE: Distribution(log_uniform=(0.01, 0.1))})) == []
    assert taken(folder, make({**SEARCH, RANK: Distribution(choice=[4, 8])})) == POINTS[1:]
    assert taken(folder, make({**SEARCH, RATE: Distribution(choice=["fast", 1e-3])})) == POINTS[:1]


def test_keys_that_were_not_searched_come_from_the_recipe(folder: Folder, make: MakeSpace) -> None:
    alpha = Distribution(choice=[8, 16])
    wider = make({**SEARCH, ALPHA: alpha})
    assert taken(folder, wider) == [{**point, ALPHA: 8} for point in POINTS]
    # Then with a rank of 2, which is what the base recipe has now.
    assert taken(folder, make({RATE: SEARCH[RATE]})) == [{RATE: 1e-3}]
    # Twice a rank of 4 is the alpha that it was, twice a rank of 2 is not.
    tied = make({**SEARCH, ALPHA: Distribution(times=2, of=RANK)})
    assert taken(folder, tied) == [{**POINTS[1], ALPHA: 8}]


def test_a_rate_is_converted_to_another_alpha(folder: Folder, make: MakeSpace) -> None:
    search = {**SEARCH, RATE: AT_ALPHA}
    assert taken(folder, make(search)) == [pytest.approx(point) for point in POINTS]
    # Four times the alpha needs half the rate.
    moved = [{**point, RATE: point[RATE] / 2} for point in POINTS]
    assert taken(folder, make(search, alpha=32)) == [pytest.approx(point) for point in moved]


def test_a_sweep_without_an_adapter_has_no_rate_at_an_alpha(
    make: MakeSpace, tmp_path: Path
) -> None:
    whole = make({RATE: SEARCH[RATE]})
    whole.base = whole.base.model_copy(update={"adapter": None})
    studied(whole, tmp_path / "full", {RATE: 1e-3})
    assert taken(Folder(str(tmp_path / "full")), make({RATE: AT_ALPHA})) == []


def test_conditions_decide_which_keys_count(folder: Folder, make: MakeSpace) -> None:
    beta = Distribution(uniform=(0.5, 0.6), when={RANK: 4})
    # The recipe's own 0.999 lies outside, where it is searched at all.
    assert taken(folder, make({**SEARCH, "optim.beta2": beta})) == POINTS[:1]
