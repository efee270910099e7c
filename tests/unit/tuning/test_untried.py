"""A sweep tries settings that it has not tried, until there are none; simulated, without Ray."""

import itertools
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.config.recipe import Recipe
from finray.tuning.combinations import Combinations
from finray.tuning.conductor import Conductor
from finray.tuning.default_search import default_space
from finray.tuning.distribution import Distribution, Settings
from finray.tuning.samplers import make_pruner, make_sampler
from finray.tuning.space import Space
from finray.tuning.study import StudyFile, SweepStudy
from finray.tuning.sweep import Sweep

RATE, RANK, DROPOUT = "optim.learning_rate", "adapter.rank", "adapter.dropout"
BATCH, MICRO = "optim.batch_size", "optim.micro_batch_size"
SCHEDULE, BETA = "optim.schedule", "optim.beta2"
RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
THIRTY = {
    RATE: Distribution(choice=RATES),
    RANK: Distribution(choice=[2, 4, 8]),
    DROPOUT: Distribution(choice=[0.0, 0.1]),
}
EXTRA = {"cmaes": "cmaes", "gp": "scipy"}
SAMPLERS = [
    name
    for name in ("tpe", "random", "nsga2", "grid", "cmaes", "gp")
    if name not in EXTRA or find_spec(EXTRA[name])
]


def make_recipe(base: Path | str = "owner/model") -> Recipe:
    data = {"train": [{"path": "/x"}], "holdout": 0.1}
    values = {"name": "x", "model": {"base": str(base)}, "adapter": {"rank": 2}, "data": data}
    return Recipe.model_validate(values)


def make_space(search: dict[str, Distribution]) -> Space:
    return Space(search, make_recipe(), Path("/"), lambda key: key)


class Simulated:
    """A sweep whose trials end with a loss that their settings decide.

    Args:
        space: what is searched.
        storage: Optuna's storage; a second attempt gets that of the first.
        points: settings to try first.
        settings: settings of the sweep.
    """

    def __init__(
        self, space: Space, storage: Any = None, points: tuple[Settings, ...] = (), **settings: Any
    ) -> None:
        self.storage = storage or optuna.storages.InMemoryStorage()
        sweep = Sweep.model_validate({"name": "s", "recipe": {}, **settings})
        metrics = [Metric("eval_loss", "min")]
        self.study = SweepStudy(
            *(self.storage, "s", metrics, space),
            make_sampler(sweep, 0),
            make_pruner(sweep, False, 900),
            sweep.seed,
        )
        self.conductor = Conductor(sweep, self.study, 3, 0.0, lambda ending: None, lambda: None)
        if not self.study.is_set_up:
            self.study.set_up(points, [])

    def play(self, until: int | None = None, together: int = 1) -> None:
        """Run trials, `together` at a time, to the end or until so many have started."""
        while not self.conductor.is_finished:
            started = []
            while len(started) < together:
                if len(self.study.rows()) == until or (one := self.conductor.next_trial()) is None:
                    break
                started.append(one)
            if len(self.study.rows()) == until:
                return  # killed: these stay open
            for one in started:
                loss = random.Random(repr(sorted(one.settings.items()))).random()
                report = {"status": "finished", "measures": {"eval_loss": loss, "tokens": 9}}
                self.conductor.finish_trial(one.number, report)

    @property
    def tried(self) -> list[Settings]:
        return [row["settings"] for row in self.study.rows()]

    @property
    def distinct(self) -> int:
        return len({repr(sorted(each.items())) for each in self.tried})

    @property
    def stored(self) -> int:
        """Number of rows of the study."""
        return len(self.study.optuna.trials)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_twenty_of_thirty_settings(sampler: str, together: int) -> None:
    sweep = Simulated(make_space(THIRTY), trials=20, sampler=sampler)
    sweep.play(together=together)
    assert (len(sweep.tried), sweep.distinct, sweep.stored) == (20, 20, 20)
    assert sweep.conductor.over is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_of_thirty_settings(sampler: str) -> None:
    sweep = Simulated(make_space(THIRTY), trials=40, sampler=sampler)
    sweep.play(together=2)
    assert (len(sweep.tried), sweep.distinct, sweep.stored) == (30, 30, 30)
    assert sweep.conductor.over == "all 30 valid settings have been tried"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_invalid_combinations_leave_no_rows(sampler: str) -> None:
    """A forward pass cannot have more rows than a step."""
    batches, micros = [2, 4, 8, 16], [1, 2, 4, 8, 16]
    space = make_space({BATCH: Distribution(choice=batches), MICRO: Distribution(choice=micros)})
    sweep = Simulated(space, points=({BATCH: 2, MICRO: 16},), trials=99, sampler=sampler)
    sweep.play(together=3)
    valid = [(batch, micro) for batch in batches for micro in micros if micro <= batch]
    assert sorted((each[BATCH], each[MICRO]) for each in sweep.tried) == sorted(valid)
    assert sweep.stored == len(valid) == 14
    assert sweep.conductor.over == "all 14 valid settings have been tried"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_conditions_and_computed_keys(sampler: str) -> None:
    space = make_space(
        {
            BETA: Distribution(choice=[0.9, 0.99, 0.999], when={SCHEDULE: "linear"}),
            SCHEDULE: Distribution(choice=["cosine", "linear"]),
            "adapter.alpha": Distribution(times=2, of=RANK),
            RANK: Distribution(choice=[2, 8]),
        }
    )
    sweep = Simulated(space, trials=99, sampler=sampler)
    sweep.play()
    tried = {(each[SCHEDULE], each.get(BETA), each[RANK]) for each in sweep.tried}
    branches = [("cosine", None), *(("linear", beta) for beta in (0.9, 0.99, 0.999))]
    assert tried == {(*branch, rank) for branch in branches for rank in (2, 8)}
    assert all(each["adapter.alpha"] == 2 * each[RANK] for each in sweep.tried)
    assert len(sweep.tried) == sweep.stored == 8


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_a_continuous_key_never_runs_out(sampler: str) -> None:
    """Also where it is active in one branch only: the other one is tried once."""
    space = make_space(
        {
            SCHEDULE: Distribution(choice=["cosine", "constant"]),
            BETA: Distribution(uniform=(0.9, 0.999), when={SCHEDULE: "constant"}),
        }
    )
    sweep = Simulated(space, trials=30, sampler=sampler)
    sweep.play()
    assert sweep.distinct == sweep.stored == 30 and sweep.conductor.over is None
    assert [each[SCHEDULE] for each in sweep.tried].count("cosine") == 1


def test_failed_settings_are_not_tried_again() -> None:
    sweep = Simulated(make_space({RANK: Distribution(choice=[2, 4, 8])}), trials=9)
    first = sweep.conductor.next_trial()
    assert first is not None
    sweep.conductor.finish_trial(first.number, {"status": "failed", "error": "out of memory"})
    sweep.play()
    assert sorted(each[RANK] for each in sweep.tried) == [2, 4, 8]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_sweep_tries_the_rest(sampler: str) -> None:
    space = make_space(THIRTY)
    killed = Simulated(space, trials=40, sampler=sampler)
    killed.play(until=17, together=2)
    sweep = Simulated(space, killed.storage, trials=40, sampler=sampler)
    assert sweep.tried == killed.tried
    sweep.play(together=2)
    assert (len(sweep.tried), sweep.distinct, sweep.stored) == (30, 30, 30)
    assert sweep.conductor.over == "all 30 valid settings have been tried"
    longer = Simulated(space, killed.storage, trials=50, sampler=sampler)
    longer.play()
    assert longer.stored == 30


@pytest.mark.long
def test_settings_are_recognised_in_the_file_of_a_study(tmp_path: Path) -> None:
    file = StudyFile(Folder(str(tmp_path)))
    adapter = Distribution(choice=[None, {"rank": 2}])
    space = make_space({"adapter": adapter, BETA: Distribution(uniform=(0.7, 0.9), step=0.2)})
    Simulated(space, file.open(), trials=9).play(until=2)
    sweep = Simulated(space, file.open(), trials=9)
    sweep.play()
    assert sweep.distinct == sweep.stored == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides(sampler: str) -> None:
    courses = []
    for seed in (3, 3, 4):
        sweep = Simulated(make_space(THIRTY), trials=25, sampler=sampler, seed=seed)
        sweep.play()
        courses.append(sweep.tried)
    assert courses[0] == courses[1]
    assert (courses[1] == courses[2]) == (sampler == "grid")


def test_a_grid_is_tried_in_order() -> None:
    space = make_space(THIRTY)
    point = {RATE: 1e-4, RANK: 8, DROPOUT: 0.1}
    sweep = Simulated(space, points=(point,), trials=9, sampler="grid")
    sweep.play()
    grid = [
        {RATE: rate, RANK: rank, DROPOUT: dropout}
        for rate, rank, dropout in itertools.product(RATES, [2, 4, 8], [0.0, 0.1])
    ]
    assert sweep.tried == [point, *grid[:8]]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_what_a_sampler_suggests_first_is_taken(sampler: str, tmp_path: Path) -> None:
    """As Optuna alone would go on, while nothing is repeated."""
    (tmp_path / "config.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    recipe = make_recipe(tmp_path)
    space = Space(default_space(recipe), recipe, Path("/"), lambda key: key)
    points = (space.rule_of_thumb(), *space.variations_of_the_rule())
    sweep = Simulated(space, points=points, trials=20, sampler=sampler, seed=5)
    sweep.play()
    alone = optuna.create_study(
        sampler=make_sampler(Sweep(name="s", recipe={}, sampler=sampler, seed=5), 0)
    )
    for point in points:
        alone.enqueue_trial(space.labels(point))
    for row in sweep.study.rows():
        trial = alone.ask()
        assert space.suggest(trial) == row["settings"]
        alone.tell(trial, row["values"][0])


def test_a_space_too_large_to_list() -> None:
    """It is neither listed nor waited for."""
    huge = {
        "seed": Distribution(int_uniform=(0, 999)),
        "optim.warmup_ratio": Distribution(uniform=(0.0, 0.999), step=0.001),
        BATCH: Distribution(int_uniform=(1, 1000)),
    }
    space = make_space(huge)
    assert Combinations(space).every_setting() is None
    sweep = Simulated(space, trials=12, sampler="random")
    sweep.play()
    assert sweep.distinct == sweep.stored == 12
    with pytest.raises(InputError):
        space.recipe({BATCH: 0})


def test_conditions_keep_a_space_small() -> None:
    """Seven keys of ten values, each in a branch of its own: seventy settings."""
    optim = ["max_grad_norm", "weight_decay", "warmup_ratio", "beta1", "beta2"]
    keys = [DROPOUT, *(f"optim.{name}" for name in optim), "data.holdout"]
    search = {"seed": Distribution(choice=list(range(7)))} | {
        key: Distribution(uniform=(0.0, 0.9), step=0.1, when={"seed": number})
        for number, key in enumerate(keys)
    }
    every = Combinations(make_space(search)).every_setting()
    assert every == [
        {"seed": number, key: tenth / 10} for number, key in enumerate(keys) for tenth in range(10)
    ]


VALUES: dict[str, list[Any]] = {
    RANK: [1, 2, 4],
    BATCH: [2, 4, 8],
    MICRO: [1, 2, 4, 8],
    SCHEDULE: ["linear", "cosine", "constant"],
}


@st.composite
def spaces(draw: st.DrawFn) -> tuple[dict[str, Distribution], list[dict[str, Any]]]:
    """A small space, and its settings, valid or not."""
    search: dict[str, Distribution] = {}
    values: dict[str, list[Any]] = {}
    for key, all_values in VALUES.items():
        if draw(st.booleans()):
            chosen = draw(st.lists(st.sampled_from(all_values), min_size=1, unique=True))
            search[key], values[key] = Distribution(choice=chosen), chosen
    if draw(st.booleans()) or not search:
        last = draw(st.integers(1, 4))
        step = draw(st.sampled_from([0.1, 0.15, 0.3]))
        high = round(last * step + draw(st.sampled_from([0.0, 0.05])), 2)
        search[DROPOUT] = Distribution(uniform=(0.0, high), step=step)
        values[DROPOUT] = [round(place * step, 10) for place in range(last + 1)]
    if SCHEDULE in search and draw(st.booleans()):
        branch = draw(st.sampled_from(values[SCHEDULE]))
        search[BETA] = Distribution(choice=[0.9, 0.99], when={SCHEDULE: branch})
        values[BETA] = [None, 0.9, 0.99]
    if draw(st.booleans()) and RANK in search:
        search["adapter.alpha"] = Distribution(times=2, of=RANK)
    return search, list(_products(search, values))


def _products(
    search: dict[str, Distribution], values: dict[str, list[Any]]
) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*values.values()):
        each = dict(zip(values, combination, strict=True))
        if BETA in each:
            is_active = (search[BETA].when or {})[SCHEDULE] == each[SCHEDULE]
            if is_active == (each[BETA] is None):
                continue
        yield {key: value for key, value in each.items() if value is not None}


def is_valid(each: dict[str, Any]) -> bool:
    return bool(each.get(MICRO, 4) <= each.get(BATCH, 32) and each.get(DROPOUT, 0.0) < 1.0)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    spaces(),
    st.integers(1, 40),
    st.sampled_from(["tpe", "random", "nsga2", "grid"]),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_a_sweep_tries_as_many_settings_as_there_are(
    drawn: tuple[dict[str, Distribution], list[dict[str, Any]]],
    trials: int,
    sampler: str,
    together: int,
    seed: int,
) -> None:
    search, every = drawn
    valid = [each for each in every if is_valid(each)]
    sweep = Simulated(make_space(search), trials=trials, sampler=sampler, seed=seed)
    sweep.play(together=together)
    count = min(trials, len(valid))
    assert (len(sweep.tried), sweep.distinct, sweep.stored) == (count, count, count)
    for each in sweep.tried:
        assert {key: each[key] for key in each if key != "adapter.alpha"} in valid
    reason = f"all {len(valid)} valid settings have been tried"
    assert sweep.conductor.over == (reason if trials > len(valid) else None)
