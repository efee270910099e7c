"""A trial in its slot's process, without Ray: what it reports, and how it ends."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.forking import ForkServer
from support.guarded import lines, recipe, run_to_the_end
from support.trials import reports_of, trial_of

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.engine.trainer import StreamTrainer
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.base_cache import BaseCache
from finray.training.records.recorder import update_run
from finray.training.records.run_folder import read_run
from finray.training.run import train
from finray.tuning.trial_actor import _objective, final_measures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.long
def test_metrics_without_a_record_are_reported_after_a_restart(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """The run is finished, but its driver has recorded only the first five steps."""
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    run_to_the_end(settings)
    written = lines(tmp_path / "run")
    with trial_of(settings, tmp_path / "sweep", reported_tokens=written[5]["tokens"]) as trial:
        *reports, end = reports_of(trial)
    reported = [(report["tokens"], report["value"]) for report in reports]
    assert reported == [(written[step]["tokens"], written[step]["loss"]) for step in range(6, 13)]
    assert reports[-1]["is_last"] and not reports[-2]["is_last"]
    assert end["status"] == "finished" and end["measures"]["loss"] == written[12]["loss"]


@pytest.mark.parametrize(("was", "becomes"), [("finished", "finished"), ("running", "pruned")])
def test_a_late_report_can_still_prune(
    was: str, becomes: str, tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """An unfinished run of a killed attempt becomes pruned; a finished one stays finished."""
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    run_to_the_end(settings)
    run = Folder(str(tmp_path / "run"))
    update_run(run, lambda record: record.update(status=was))
    with trial_of(settings, tmp_path / "sweep") as trial:
        assert trial.next_report()["measures"]["step"] == 1
        trial.abort()
        end = trial.next_report()
    assert end["status"] == "pruned"
    assert (read_run(run) or {})["status"] == becomes


@pytest.mark.long
def test_the_base_is_measured_once_for_all_trials_of_a_slot(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials with another rank start from the same base model."""
    measured: list[str] = []
    held_out = StreamTrainer.evaluate_held_out

    def counted(trainer: StreamTrainer, rows: Any) -> dict[str, float]:
        if trainer.state.global_step == 0:
            measured.append(trainer.args.output_dir)
        return held_out(trainer, rows)

    monkeypatch.setattr(StreamTrainer, "evaluate_held_out", counted)
    before = []
    bases = BaseCache()
    for name, rank in (("one", 4), ("two", 8)):
        settings = with_holdout(recipe(tiny_model, chat_file, tmp_path, name), rank)
        before.append(train(settings, InProcessLauncher(bases=bases))["before"])
    assert len(measured) == 1
    alone = run_to_the_end(with_holdout(recipe(tiny_model, chat_file, tmp_path, "alone"), 8))
    assert before[0] == before[1] == alone["before"] and before[0]["eval_loss"] > 0
    assert len(measured) == 2


@pytest.mark.long
def test_a_slot_does_not_load_torchs_compiler(fork_server: ForkServer) -> None:
    """The server has what else a slot loads, and more."""
    program = (
        "import sys, finray.tuning.trial_actor\n"
        "import finray.training.models.base_cache, finray.training.engine.worker\n"
        "print('peft' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)"
    )
    assert fork_server.run(program).split() == ["True", "False"]


def with_holdout(settings: Recipe, rank: int) -> Recipe:
    values = settings.model_dump(mode="json")
    values["adapter"]["rank"] = rank
    values["data"]["holdout"] = 0.2
    values["optim"]["max_steps"] = 2
    values["eval"]["samples"] = 0
    return Recipe.model_validate(values)


LINES = [
    {"step": 1, "tokens": 10, "loss": 2.0, "grad_norm": 1.0},
    {"step": 2, "tokens": 20, "loss": 1.5, "grad_norm": 0.5},
    {"step": 2, "tokens": 20, "eval_loss": 1.8},
    {"step": 3, "tokens": 30, "loss": None, "grad_norm": None, "skipped": 1},
    {"step": 3, "tokens": 30, "eval_loss": None},
]
"""Steps 1 and 2, and a skipped one; the last evaluation is not finite."""


def test_a_skipped_step_changes_no_result_but_a_diverged_model_does(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    Folder(str(tmp_path / "run")).create().write("metrics.jsonl", text.encode())
    measures = final_measures(settings, {})
    assert (measures["loss"], measures["grad_norm"]) == (1.5, 0.5)
    assert measures["eval_loss"] is None
    assert [_objective(line, "loss") for line in LINES] == [2.0, 1.5, None, None, None]
    values = [_objective(line, "eval_loss") for line in LINES]
    assert values[:4] == [None, None, 1.8, None] and math.isnan(values[4] or 0.0)
