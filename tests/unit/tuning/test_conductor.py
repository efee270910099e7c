"""A search without training: what is stored in Optuna, and when a sweep ends."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from finray.training.common.errors import InputError, RunError
from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.config.recipe import Recipe
from finray.tuning.combinations import Combinations
from finray.tuning.conductor import Conductor
from finray.tuning.distribution import Distribution
from finray.tuning.progress import Ending
from finray.tuning.samplers import MedianPruner, make_pruner, make_sampler
from finray.tuning.space import Space
from finray.tuning.study import StudyFile, SweepStudy
from finray.tuning.sweep import Sweep

SEARCH = {
    "optim.learning_rate": Distribution(log_uniform=(1e-5, 1e-1)),
    "adapter.rank": Distribution(choice=[2, 4]),
}


@pytest.fixture
def space(tiny_model: Path) -> Space:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(tiny_model)},
            "adapter": {"rank": 2},
            "data": {"train": [{"path": "/x"}], "holdout": 0.1},
        }
    )
    return Space(SEARCH, recipe, Path("/"), lambda key: key)


class SimulatedSweep:
    """A sweep whose trials are simulated by the test."""

    def __init__(self, space: Space, folder: Path | None = None, **settings: Any) -> None:
        storage: Any = optuna.storages.InMemoryStorage()
        if folder is not None:
            storage = StudyFile(Folder(str(folder))).open()
        self.sweep = Sweep.model_validate({"name": "s", "recipe": {}, **settings})
        self.endings: list[Ending] = []
        self.stops = 0
        names = [objective.metric for objective in self.sweep.objective] or ["eval_loss"]
        metrics = [Metric(name, "min") for name in names]
        self.study = SweepStudy(
            storage,
            "s",
            metrics,
            space,
            make_sampler(self.sweep, 0),
            make_pruner(self.sweep, len(metrics) == 1, 900),
            self.sweep.seed,
        )
        self.conductor = Conductor(self.sweep, self.study, 2, 0.0, self._changed, self._stop)

    def _changed(self, ending: Ending | None) -> None:
        self.endings += [ending] if ending else []

    def _stop(self) -> None:
        self.stops += 1

    def start(self) -> int:
        assignment = self.conductor.next_trial()
        assert assignment is not None
        return assignment.number

    def finish(self, number: int, loss: float | None, **others: float) -> None:
        measures = {"eval_loss": loss, "tokens": 900, **others}
        self.conductor.finish_trial(number, {"status": "finished", "measures": measures})

    def fail(self, number: int, error: str, code: int = 1) -> None:
        report = {"status": "failed", "error": error, "exit_code": code}
        self.conductor.finish_trial(number, report)

    def state(self, number: int) -> TrialState:
        return self.study.optuna.trials[number].state


def test_pruned_trials_are_stored_as_pruned(space: Space) -> None:
    sweep = SimulatedSweep(space)
    good, bad = sweep.start(), sweep.start()
    assert sweep.conductor.next_trial() is None, "more than two at a time"
    # the first rung is at a fifth of 900 tokens
    assert not sweep.conductor.report(good, 180, 1.0, False)
    assert not sweep.conductor.report(bad, 100, 2.0, False)
    assert sweep.conductor.report(bad, 180, 2.0, False)
    sweep.conductor.finish_trial(bad, {"status": "running", "measures": {"tokens": 180}})
    assert sweep.state(bad) == TrialState.PRUNED
    assert sweep.study.optuna.trials[bad].intermediate_values == {100: 2.0, 180: 2.0}
    sweep.finish(good, 0.5)
    assert sweep.state(good) == TrialState.COMPLETE and sweep.study.best() == [good]
    assert [ending.state for ending in sweep.endings] == ["pruned", "finished"]


def test_a_trial_at_its_end_is_not_pruned(space: Space) -> None:
    sweep = SimulatedSweep(space)
    first, second = sweep.start(), sweep.start()
    assert not sweep.conductor.report(first, 900, 1.0, True)
    assert not sweep.conductor.report(second, 900, 2.0, True)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_an_objective_that_is_not_finite_fails_the_trial(space: Space, loss: float | None) -> None:
    sweep = SimulatedSweep(space)
    number = sweep.start()
    sweep.finish(number, loss)
    assert sweep.state(number) == TrialState.FAIL
    assert "eval_loss is" in str(sweep.study.rows()[number]["error"])


def test_an_objective_that_was_not_reported_fails_the_trial(space: Space) -> None:
    sweep = SimulatedSweep(space)
    number = sweep.start()
    sweep.conductor.finish_trial(number, {"status": "finished", "measures": {"tokens": 900}})
    assert sweep.state(number) == TrialState.FAIL
    assert sweep.endings[0].text == "the run did not report the objective eval_loss"


def test_nan_during_training_fails_the_trial(space: Space) -> None:
    sweep = SimulatedSweep(space)
    number = sweep.start()
    assert sweep.conductor.report(number, 100, math.nan, False)
    sweep.conductor.finish_trial(number, {"status": "running", "measures": {}})
    assert sweep.state(number) == TrialState.FAIL


def test_a_lost_process_fails_its_trial(space: Space) -> None:
    sweep = SimulatedSweep(space)
    number = sweep.start()
    sweep.conductor.finish_trial(number, None, "its process was lost")
    assert sweep.state(number) == TrialState.FAIL and sweep.stops == 0


def test_three_equal_failures_end_a_sweep(space: Space) -> None:
    sweep = SimulatedSweep(space, trials=100)
    for step in (1, 22, 333):
        assert sweep.stops == 0
        sweep.fail(sweep.start(), f"step {step}: the loss is nan")
    assert sweep.stops == 1 and sweep.conductor.is_finished
    assert isinstance(sweep.conductor.error, RunError)
    assert "step 1: the loss is nan" in str(sweep.conductor.error)


def test_input_errors_of_trials_are_an_input_error_of_the_sweep(space: Space) -> None:
    sweep = SimulatedSweep(space)
    for _ in range(3):
        sweep.fail(sweep.start(), "wrong", 2)
    assert isinstance(sweep.conductor.error, InputError)


def test_failures_after_a_success_do_not_end_a_sweep(space: Space) -> None:
    sweep = SimulatedSweep(space)
    sweep.finish(sweep.start(), 1.0)
    for _ in range(4):
        sweep.fail(sweep.start(), "same")
    assert sweep.conductor.error is None and not sweep.conductor.is_finished


@pytest.mark.long
def test_a_killed_sweep_resumes_its_running_trials(space: Space, tmp_path: Path) -> None:
    before = SimulatedSweep(space, tmp_path, trials=3)
    done, running = before.start(), before.start()
    before.conductor.report(running, 50, 0.9, False)
    before.finish(done, 1.0)
    settings = before.study.rows()[running]["settings"]

    after = SimulatedSweep(space, tmp_path, trials=3)
    again = after.conductor.next_trial()
    assert again is not None and (again.number, again.settings) == (running, settings)
    # a measurement that was reported before the kill is reported again, and counts once
    assert not after.conductor.report(running, 50, 0.8, False)
    assert after.study.rows()[running]["curve"] == [[50, 0.9]]
    after.finish(running, 0.7)
    after.finish(after.start(), 2.0)
    assert after.conductor.is_finished and after.conductor.next_trial() is None
    assert [row["state"] for row in after.study.rows()] == ["finished"] * 3
    assert after.study.best() == [running]


def test_an_interrupted_trial_stays_open(space: Space) -> None:
    sweep = SimulatedSweep(space)
    number = sweep.start()
    sweep.conductor.interrupt()
    assert sweep.stops == 1 and sweep.conductor.next_trial() is None
    sweep.conductor.finish_trial(number, {"status": "stopped", "measures": {"tokens": 10}})
    assert sweep.state(number) == TrialState.RUNNING and not sweep.endings


def test_a_used_up_budget_prunes_running_trials(space: Space) -> None:
    sweep = SimulatedSweep(space)
    number = sweep.start()
    sweep.conductor.end("the time budget is used up")
    sweep.conductor.finish_trial(number, {"status": "stopped", "measures": {"tokens": 10}})
    assert sweep.state(number) == TrialState.PRUNED
    assert "time budget" in str(sweep.study.rows()[number]["reason"])


@pytest.mark.parametrize(
    ("bounds", "losses", "ends"),
    [
        ({"value": 0.5}, [0.6, 0.5], [False, True]),
        ({"trials_without_gain": 2}, [0.5, 0.6, 0.7], [False, False, True]),
        ({"tokens": 1800}, [0.5, 0.6], [False, True]),
    ],
)
def test_stop_when(
    space: Space, bounds: dict[str, Any], losses: list[float], ends: list[bool]
) -> None:
    sweep = SimulatedSweep(space, stop_when=bounds)
    for loss, ended in zip(losses, ends, strict=True):
        sweep.finish(sweep.start(), loss)
        assert (sweep.conductor.over is not None) == ended


def test_a_trial_that_joins_the_pareto_front_is_a_gain(space: Space) -> None:
    sweep = SimulatedSweep(
        space, objective=["eval_loss", "adapter_bytes"], stop_when={"trials_without_gain": 2}
    )
    ends = []
    for loss, size in ((0.5, 9.0), (1.0, 5.0), (1.5, 4.0), (1.6, 4.0), (1.7, 4.0)):
        sweep.finish(sweep.start(), loss, adapter_bytes=size)
        ends.append(sweep.conductor.over is not None)
    assert ends == [False, False, False, False, True]


def test_points_first_and_no_setting_twice(space: Space) -> None:
    sweep = SimulatedSweep(space)
    points = [
        {"optim.learning_rate": 1e-3, "adapter.rank": 4},
        {"optim.learning_rate": 1e-4, "adapter.rank": 2},
    ]
    sweep.study.set_up([*points, points[0]], [])
    for point in points:
        assignment = sweep.conductor.next_trial()
        assert assignment is not None and assignment.settings == point
        sweep.finish(assignment.number, 1.0)
    other = sweep.conductor.next_trial()
    assert other is not None and other.settings not in points


def test_numbers_are_equal_in_any_notation(space: Space) -> None:
    """The recipe has 0.0, and the choice is 0."""
    search = {"optim.weight_decay": Distribution(choice=[0, 0.01])}
    whole = Space(search, space.base, Path("/"), lambda key: key)
    sweep = SimulatedSweep(whole)
    sweep.study.set_up([whole.rule_of_thumb()], [])
    assignment = sweep.conductor.next_trial()
    assert assignment is not None
    assert assignment.settings == {"optim.weight_decay": 0}
    with pytest.raises(InputError, match="not in the search space"):
        whole.point({"optim.weight_decay": False}, "points")


def test_a_grid_ends_with_its_last_setting(tiny_model: Path, space: Space) -> None:
    finite = Space(
        {"adapter.rank": Distribution(choice=[2, 4, 8])}, space.base, Path("/"), lambda key: key
    )
    sweep = SimulatedSweep(finite, sampler="grid")
    sweep.study.set_up(Combinations(finite).every_setting() or [], [])
    for rank in (2, 4, 8):
        assignment = sweep.conductor.next_trial()
        assert assignment is not None and assignment.settings == {"adapter.rank": rank}
        sweep.finish(assignment.number, float(rank))
    assert sweep.conductor.next_trial() is None and sweep.conductor.is_finished


def test_the_pareto_front(space: Space) -> None:
    sweep = SimulatedSweep(space, objective=["eval_loss", "adapter_bytes"])
    for loss, size in ((1.0, 5.0), (0.5, 9.0), (1.5, 6.0)):
        sweep.finish(sweep.start(), loss, adapter_bytes=size)
    assert sweep.study.best() == [1, 0]


def test_the_median_pruner_compares_unequal_token_counts(space: Space) -> None:
    study = optuna.create_study(pruner=MedianPruner(100))
    for start, loss in ((90, 1.0), (95, 2.0), (105, 3.0), (110, 4.0)):
        trial = study.ask()
        trial.report(loss, start)
        trial.report(loss, start + 100)
        study.tell(trial, loss)
    for loss, pruned in ((1.4, False), (1.6, True)):
        trial = study.ask()
        # by 100 tokens only the first two were measured: the median of 1, 2, inf, inf is inf
        trial.report(9.0, 100)
        assert not trial.should_prune()
        trial.report(loss + 1.0, 150)
        assert trial.should_prune() == pruned
        study.tell(trial, state=TrialState.PRUNED)
