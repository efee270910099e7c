"""Population-based training, simulated: who is replaced, and that crashes change nothing."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from finray.training.common.errors import InputError
from finray.training.config.metric import Metric
from finray.training.config.models import LoraAdapter
from finray.training.config.recipe import Recipe
from finray.tuning.conductor import Conductor
from finray.tuning.distribution import Distribution
from finray.tuning.pbt import Population, perturbed
from finray.tuning.plan import make_plan
from finray.tuning.progress import Ending
from finray.tuning.resume import check_folder, describe
from finray.tuning.samplers import make_pruner, make_sampler
from finray.tuning.space import Space
from finray.tuning.study import SweepStudy
from finray.tuning.sweep import Sweep, load_sweep
from finray.tuning.sweep_folder import write_sweep

RATE, DECAY = "optim.learning_rate", "optim.weight_decay"
GENERATIONS, TOKENS = 4, 100


class Killed(Exception):
    pass


class SimulatedSweep:
    """A simulated sweep, whose loss falls faster near a rate of 1e-3; `weights` is the state.

    Args:
        recipe: the base recipe.
        settings: settings of the sweep.
    """

    def __init__(self, recipe: Recipe, **settings: Any) -> None:
        self.storage = optuna.storages.InMemoryStorage()
        search = {
            RATE: Distribution(log_uniform=(1e-5, 1e-1)),
            DECAY: Distribution(uniform=(0.0, 0.1)),
        }
        self.space = Space(search, recipe, Path("/"), lambda key: key)
        values = {"trials": 8, "pruning": {"kind": "pbt"}, "sampler": "random", **settings}
        self.sweep = Sweep.model_validate({"name": "s", "recipe": {}, **values})
        self.weights: dict[int, tuple[int, float]] = {}
        self.copies: list[tuple[int, int]] = []
        self.kill_at: int | None = None
        """The driver is killed after this many copies of a checkpoint."""

    def open(self, concurrency: int = 3) -> None:
        """Start the driver, or start it again."""
        metrics = [Metric("eval_loss", "min")]
        self.study = SweepStudy(
            *(self.storage, "s", metrics, self.space),
            make_sampler(self.sweep, 0),
            make_pruner(self.sweep, False, 1000),
        )
        if not self.study.is_set_up:
            self.study.set_up([self.space.rule_of_thumb()], [])
        population = Population(self.sweep, self.study, self.space, self._inherit)
        self.endings: list[Ending] = []
        self.conductor = Conductor(
            *(self.sweep, self.study, concurrency, 0.0, self._changed, lambda: None, population)
        )

    def _changed(self, ending: Ending | None) -> None:
        self.endings += [ending] if ending else []

    def _inherit(self, parent: int, child: int) -> None:
        if self.kill_at is not None and len(self.copies) == self.kill_at:
            self.kill_at = None
            raise Killed
        self.copies.append((parent, child))
        self.weights[child] = self.weights[parent]

    def play(self, failing: frozenset[int] = frozenset()) -> None:
        """Train to the end, with as many trials at the same time as allowed."""
        while not self.conductor.is_finished:
            running = []
            while (assignment := self.conductor.next_trial()) is not None:
                running.append(assignment)
            assert running or self.conductor.is_finished, "nobody trains, and nobody may"
            for item in reversed(running):
                if item.number in failing:
                    self.conductor.finish_trial(item.number, {"status": "failed", "error": "nan"})
                else:
                    self._train(item.number, item.settings[RATE], item.until or GENERATIONS)

    def _train(self, number: int, rate: float, until: int) -> None:
        reached, loss = self.weights.get(number, (0, 1.0))
        for _ in range(reached, until):
            loss *= 0.5 if 3e-4 < rate < 3e-3 else 0.9
        self.weights[number] = (until, loss)
        measures = {"eval_loss": loss, "tokens": until * TOKENS, "step": until}
        self.conductor.report(number, until * TOKENS, loss, until == GENERATIONS)
        status = "finished" if until == GENERATIONS else "paused"
        self.conductor.finish_trial(number, {"status": status, "measures": measures})

    def history(self) -> list[Any]:
        rows = self.study.rows()
        return [(row["state"], row["settings"], row["values"], row["parent"]) for row in rows]


@pytest.fixture
def recipe(tiny_model: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(tiny_model)},
            "adapter": {"rank": 2},
            "data": {"train": [{"path": "/x"}], "holdout": 0.1},
        }
    )


def test_copies_of_the_best_replace_the_worst(recipe: Recipe) -> None:
    sweep = SimulatedSweep(recipe)
    sweep.open()
    sweep.play()
    rows = {row["number"]: row for row in sweep.study.rows()}
    # two of eight are replaced after each of the three generations before the last
    assert len(rows) <= 8 + 2 * (GENERATIONS - 1) and sweep.copies
    states = [row["state"] for row in rows.values()]
    assert states.count("finished") == 8 and states.count("pruned") == len(sweep.copies)
    for parent, child in sweep.copies:
        origin = rows[child]["parent"]
        assert origin["trial"] == parent
        curve = dict(rows[parent]["curve"])
        replaced = next(
            row for row in rows.values() if f"replaced by trial {child}," in (row["reason"] or "")
        )
        assert curve[origin["tokens"]] < dict(replaced["curve"])[origin["tokens"]]
        inherited, new = rows[parent]["settings"], rows[child]["settings"]
        assert new != inherited and new.keys() == inherited.keys()
        assert rows[child]["tokens"] == rows[child]["measures"]["tokens"] - origin["tokens"]
    own = sum(row["tokens"] for row in rows.values())
    assert own == 8 * GENERATIONS * TOKENS, "a copied token counts as trained"
    best = rows[sweep.study.best()[0]]
    assert best["values"] == [min(loss for _, loss in sweep.weights.values())]
    states = {trial.state for trial in sweep.study.optuna.trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}


def test_the_seed_decides_the_result(recipe: Recipe) -> None:
    courses = []
    for concurrency, seed in ((8, 0), (1, 0), (8, 1)):
        sweep = SimulatedSweep(recipe, seed=seed)
        sweep.open(concurrency)
        sweep.play()
        courses.append(sweep.history())
    assert courses[0] == courses[1] != courses[2]


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_a_kill_while_members_are_replaced_changes_nothing(recipe: Recipe, kill_at: int) -> None:
    whole = SimulatedSweep(recipe)
    whole.open()
    whole.play()
    sweep = SimulatedSweep(recipe)
    sweep.kill_at = kill_at
    sweep.open()
    with pytest.raises(Killed):
        sweep.play()
    sweep.open()
    sweep.play()
    assert sweep.history() == whole.history()


def test_a_failed_member_is_replaced(recipe: Recipe) -> None:
    sweep = SimulatedSweep(recipe, trials=4)
    sweep.open()
    sweep.play(failing=frozenset({2}))
    rows = sweep.study.rows()
    assert rows[2]["state"] == "failed"
    assert [row["state"] for row in rows].count("finished") == 4


@pytest.mark.parametrize("measures", [{}, {"eval_loss": None}, {"eval_loss": float("nan")}])
def test_a_member_without_a_value_at_a_milestone_is_replaced(
    recipe: Recipe, measures: dict[str, Any]
) -> None:
    sweep = SimulatedSweep(recipe, trials=4)
    sweep.open(concurrency=4)
    members = [sweep.conductor.next_trial() for _ in range(4)]
    for item in members[1:]:
        assert item is not None
        sweep._train(item.number, item.settings[RATE], 1)
    report = {"status": "paused", "measures": {**measures, "tokens": TOKENS, "step": 1}}
    sweep.conductor.finish_trial(0, report)
    assert [(ending.number, ending.state) for ending in sweep.endings] == [(0, "failed")]
    sweep.play()
    states = [row["state"] for row in sweep.study.rows()]
    assert states[0] == "failed" and states.count("finished") == 4


def test_a_population_that_fails_ends(recipe: Recipe) -> None:
    sweep = SimulatedSweep(recipe, trials=2)
    sweep.open()
    sweep.play(failing=frozenset(range(10)))
    assert [row["state"] for row in sweep.study.rows()] == ["failed", "failed"]


def test_a_used_up_budget_ends_paused_members(recipe: Recipe) -> None:
    sweep = SimulatedSweep(recipe, trials=3)
    sweep.open(concurrency=1)
    first = sweep.conductor.next_trial()
    assert first is not None
    sweep._train(first.number, 1e-3, 1)
    second = sweep.conductor.next_trial()
    assert second is not None and second.number != first.number
    sweep.conductor.end("the time budget is used up")
    assert [(ending.number, ending.state) for ending in sweep.endings] == [(first.number, "pruned")]
    assert sweep.conductor.is_finished


def test_perturbed_values_lie_in_the_space(recipe: Recipe) -> None:
    sweep = SimulatedSweep(recipe)
    settings = {RATE: 9e-2, DECAY: 0.0}
    seen = [perturbed(sweep.space, settings, random.Random(seed)) for seed in range(60)]
    rates = {settings[RATE] for settings in seen}
    assert len(rates) > 10 and all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert {0.0, 0.01} <= {settings[DECAY] for settings in seen}, "nothing leaves zero"


def test_a_rate_at_an_alpha_is_perturbed_like_another(recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"adapter": LoraAdapter(rank=2, alpha=2)})
    search = {RATE: Distribution(log_uniform=(1e-4, 1e-2), at_alpha=32)}
    space = Space(search, recipe, Path("/"), lambda key: key)
    # At an alpha of 2 the rates are four times those at 32.
    settings = {RATE: 0.02}
    seen = {perturbed(space, settings, random.Random(seed))[RATE] for seed in range(60)}
    assert all(4e-4 <= rate <= 0.0400001 for rate in seen) and len(seen) > 10
    assert {0.016, 0.025} <= {round(rate, 9) for rate in seen}


def test_a_population_keeps_its_size(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "sweep.yaml"
    base = (
        f"{{model: {{base: {recipe.model.base}}}, data: {{train: [{{path: /x}}], holdout: 0.1}}}}"
    )
    path.write_text(f"name: s\nrecipe: {base}\npruning: {{kind: pbt}}\nstorage: {tmp_path}\n")
    plan = make_plan(load_sweep(path))
    record: dict[str, object] = {"name": "s", "status": "stopped", "settings": describe(plan)}
    record |= {"objectives": [], "trials": [], "best": [], "prunes": True}
    record |= {"excluded": {"count": 0, "first": None}}
    write_sweep(plan.folder.create(), record)
    assert check_folder(plan) is not None
    with pytest.raises(InputError, match="trials: 30 before, 20 now"):
        check_folder(make_plan(load_sweep(path, ("trials=20",))))


def test_keys_that_cannot_change_during_a_run_are_refused(tmp_path: Path) -> None:
    text = """\
name: s
recipe: {model: {base: owner/model}, adapter: {}, data: {train: [{path: /x}], holdout: 0.1}}
search:
  optim.learning_rate: {log_uniform: [1.0e-4, 1.0e-3]}
  adapter.rank: {choice: [2, 4]}
pruning: {kind: pbt}
"""
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"sweep\.yaml:5: search\.adapter\.rank.*learning_rate"):
        make_plan(load_sweep(path))
    for change in ("retrain={}", "sampler=grid", "trials=1"):
        with pytest.raises(InputError, match="pbt"):
            load_sweep(path, (change,))
