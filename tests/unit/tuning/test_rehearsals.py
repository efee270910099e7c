"""What differs between trials is rehearsed before one starts; a refused one takes no slot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rehearsed import OK, NothingWrong

from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT
from finray.training.config.recipe import Recipe
from finray.training.rehearsal import child
from finray.training.rehearsal.outcome import Outcome
from finray.tuning.conductor import Conductor
from finray.tuning.plan import make_plan
from finray.tuning.ray_tune import _ConductedSearch, _Guard
from finray.tuning.rehearsals import Rehearsals
from finray.tuning.samplers import make_pruner, make_sampler
from finray.tuning.study import SweepStudy
from finray.tuning.sweep import load_sweep

optuna = pytest.importorskip("optuna")

BAD = Outcome("refused", message="adapter.targets: LoRA on v_proj breaks it; leave it out")
MIXES = Outcome("ok", unpacked_because="its kernels take no borders")


class Judged(NothingWrong):
    """A child that refuses v_proj, and finds that eager attention mixes documents."""

    seen: list[tuple[Any, int]] = []

    def start(self, recipe: Recipe) -> None:
        assert recipe.adapter is not None
        self.recipe = recipe
        self.seen.append((recipe.adapter.targets, recipe.adapter.rank))

    def outcome(self) -> Outcome:
        assert self.recipe.adapter is not None
        if "v_proj" in self.recipe.adapter.targets:
            return BAD
        return MIXES if self.recipe.model.attention == "eager" else OK


@pytest.fixture
def rehearsals(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, chat_file: Path, tmp_path: Path
) -> Callable[..., tuple[Any, Rehearsals]]:
    monkeypatch.setattr(child, "_Child", Judged)
    Judged.seen.clear()

    def make(**search: list[Any]) -> tuple[Any, Rehearsals]:
        recipe = {
            "model": {"base": str(tiny_model)},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": str(chat_file)}], "max_length": 64},
            "optim": {"batch_size": 4, "max_steps": 2},
        }
        keys = {key.replace("__", "."): {"choice": values} for key, values in search.items()}
        values = {"name": "s", "recipe": recipe, "search": keys, "storage": str(tmp_path / "runs")}
        plan = make_plan(load_sweep({**values, "trials": 12, "objective": "loss"}))
        return plan, Rehearsals(plan.combinations, plan.trial_recipe, SILENT)

    return make


def test_a_refused_trial_takes_no_slot_and_has_no_second(
    rehearsals: Callable[..., tuple[Any, Rehearsals]],
) -> None:
    targets = ["all-linear", ["v_proj"], ["q_proj"]]
    plan, made = rehearsals(adapter__targets=targets, adapter__rank=[2, 8], optim__beta1=[0.8, 0.9])
    made.start(plan.points)
    assert sorted(map(str, (name for name, _ in Judged.seen))) == sorted(map(str, targets))
    conductor, study = conduct(plan, made)
    guard = _Guard(conductor)
    search = _ConductedSearch(conductor, lambda given: start(made, given), guard)
    started = []
    while not conductor.is_finished:
        if isinstance(config := search.suggest("a"), dict):
            started.append(config["settings"])
            measures = {"loss": 0.5, "tokens": 9}
            conductor.finish_trial(config["number"], {"status": "finished", "measures": measures})
    guard.raise_error()
    rows = study.rows()
    refused = [row for row in rows if row["state"] == "failed"]
    assert [row["error"] for row in refused] == [BAD.message] and len(started) == 8
    assert ["v_proj"] not in [settings["adapter.targets"] for settings in started]
    assert len(Judged.seen) == len(targets) and made.refusals == {BAD.message}
    assert study.exhausted == "all 8 valid settings have been tried"


def test_a_sweep_of_which_all_trials_are_refused(
    rehearsals: Callable[..., tuple[Any, Rehearsals]],
) -> None:
    plan, made = rehearsals(adapter__targets=[["v_proj"], ["v_proj", "q_proj"]])
    with pytest.raises(InputError, match=r"^adapter.targets: LoRA on v_proj breaks it"):
        made.start(plan.points)


def test_each_trial_trains_on_data_packed_as_its_model_takes_it(
    rehearsals: Callable[..., tuple[Any, Rehearsals]],
) -> None:
    plan, made = rehearsals(model__attention=["sdpa", "eager"])
    made.start(plan.points)
    packing = {
        kind: made.ready({"model.attention": kind}).prepared.manifest.packing
        for kind in ("sdpa", "eager")
    }
    assert packing == {"sdpa": True, "eager": False} and len(made.prepared) == 2


def test_stages_that_trials_share_are_done_once(
    rehearsals: Callable[..., tuple[Any, Rehearsals]], tmp_path: Path
) -> None:
    stages = ["normalise", "deduplicate", "redact"]
    choices = [stages[:n] for n in range(4)]
    plan, made = rehearsals(data__curate=choices, data__mix=[None, {"temperature": 0.5}])
    made.start(plan.points)
    assert (
        len(made.prepared) == len(list((tmp_path / "runs/prepared").glob("*/manifest.json"))) == 8
    )
    done = (tmp_path / "runs" / "prepared" / "stages").glob("*/manifest.json")
    assert sorted(json.loads(file.read_bytes())["kind"] for file in done) == sorted(
        ["read", *stages]  # a mixture counts what it reads
    )


def conduct(plan: Any, made: Rehearsals) -> tuple[Conductor, SweepStudy]:
    storage = optuna.storages.InMemoryStorage()
    sampler, pruner = make_sampler(plan.sweep, 0), make_pruner(plan.sweep, False, 900)
    study = SweepStudy(
        *(storage, "s", plan.metrics, plan.space, sampler, pruner), refused=made.refusal
    )
    study.set_up(plan.points, [])
    return Conductor(plan.sweep, study, 1, 0.0, lambda _: None, lambda: None), study


def start(made: Rehearsals, assignment: Any) -> Any:
    made.ready(assignment.settings)
    return {"number": assignment.number, "settings": assignment.settings}
