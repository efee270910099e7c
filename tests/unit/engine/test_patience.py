"""eval.patience: when a run ends early, also over a restart, and what it says."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.harness import assert_same_result

from finray.cluster.screens.summary import render_summary
from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.config.recipe import Recipe
from finray.training.engine.progress import TrainingProgress
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records.run_folder import existing_run
from finray.training.run import prepare_data, run_folder, run_prepared

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_another_metric_counts_from_its_first_measurement() -> None:
    progress = TrainingProgress()
    for step, value in ((2, 1.2), (4, 1.3)):
        progress.step = step
        progress.measured(value, Metric("eval_loss", "min"))
    assert (progress.best, progress.waited) == (1.2, 1)
    progress.watch(Metric("eval_exact_match", "max"))
    assert (progress.best, progress.waited) == (None, 0)
    for step, value in ((6, 0.5), (8, 0.9)):
        progress.step = step
        progress.measured(value, Metric("eval_exact_match", "max"))
    assert (progress.best, progress.best_step, progress.waited) == (0.9, 8, 0)


def make(model: Path, data: Path, storage: Path, name: str, **evaluation: Any) -> Recipe:
    # A rate whose steps change no value: every measurement after the first one is no gain.
    optim = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 12, "learning_rate": 1e-30}
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"base": str(model)},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": str(data)}], "holdout": 0.2, "max_length": 128},
            "optim": optim,
            "eval": {"every_steps": 2, **evaluation},
            "log": {"every_steps": 1, "to": []},
            "scale": {"workers": 0},
            "storage": str(storage),
        }
    )


def go(recipe: Recipe, until: int | None = None) -> dict[str, Any]:
    run_prepared(recipe, prepare_data(recipe), InProcessLauncher(), until=until)
    return existing_run(run_folder(recipe))


@pytest.mark.long
def test_a_run_ends_early_and_says_why(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    """Measured at 2 (the best), 4 and 6; interrupted at 4 it ends at the same step."""
    whole, parts = (
        make(tiny_model, chat_file, tmp_path, name, patience=2) for name in ("whole", "parts")
    )
    record = go(whole)
    assert (record["status"], record["step"], record["total_steps"]) == ("finished", 6, 12)
    assert record["over"].startswith("eval_loss has not improved for 2 measurements")
    assert record["over"].endswith("at step 2")
    assert "ended early: eval_loss has not" in render_summary(Folder(str(tmp_path / "whole")))
    assert go(parts, 4)["status"] == "stopped"
    assert go(parts)["over"] == record["over"]
    assert_same_result(tmp_path / "parts", tmp_path / "whole")


def test_what_counts_as_a_gain() -> None:
    progress, loss = TrainingProgress(), Metric("eval_loss", "min")
    waited = []
    for step, value in enumerate([math.nan, 2.0, 2.0, None, 1.0, math.inf], start=1):
        progress.step = step
        progress.measured(value, loss)
        progress.measured(0.0, loss)  # the same step once more counts once
        waited.append(progress.waited)
    assert waited == [1, 0, 1, 2, 0, 1]
    assert (progress.best, progress.best_step) == (1.0, 5)


def test_patience_needs_measurements(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"set eval.every_steps, too"):
        make(tiny_model, chat_file, tmp_path, "x", patience=2, every_steps=None)
