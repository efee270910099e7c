"""A run in segments equals an uninterrupted run; a checkpoint continues with other settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import guarded
from support.harness import assert_same_result, losses, metrics

from finray.training.config.recipe import Recipe
from finray.training.data.batching import Batch
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records.run_folder import existing_run
from finray.training.run import prepare_data, run_folder, run_prepared

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make(model: Path, data: Path, storage: Path, name: str, **optim: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"base": str(model)},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"train": [{"path": str(data)}], "max_length": 128},
            "optim": {
                "batch_size": 4,
                "micro_batch_size": 2,
                "max_steps": 9,
                "schedule": "linear",
                "learning_rate": 1e-3,
                **optim,
            },
            "log": {"every_steps": 1, "to": []},
            "scale": {"workers": 0},
            "storage": str(storage),
        }
    )


def go(recipe: Recipe, until: int | None = None) -> dict[str, Any]:
    """Train up to a step; returns run.json."""
    prepared = prepare_data(recipe)
    run_prepared(recipe, prepared, InProcessLauncher(), until=until)
    return existing_run(run_folder(recipe))


@pytest.mark.long
def test_segments_make_the_same_run(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    single, parts = (make(tiny_model, chat_file, tmp_path, name) for name in ("whole", "parts"))
    assert go(single)["status"] == "finished"
    for until in (3, 7):
        record = go(parts, until)
        assert (record["status"], record["step"]) == ("stopped", until)
    assert go(parts)["status"] == "finished"
    assert_same_result(tmp_path / "parts", tmp_path / "whole")


class _GoneError(BaseException):
    """Passes all handlers of errors, as the end of a process does."""


@pytest.mark.long
def test_a_lost_run_under_a_budget_of_tokens_is_continued_bit_for_bit(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in the middle of step 6, after the checkpoint of step 4."""

    def settings(name: str) -> Recipe:
        budget = {"micro_batch_size": None, "micro_batch_tokens": 200, "max_steps": 8}
        whole = guarded.recipe(tiny_model, chat_file, tmp_path, name, **budget)
        assert whole.adapter is not None
        adapter = whole.adapter.model_copy(update={"dropout": 0.1})
        return whole.model_copy(update={"adapter": adapter})

    sizes: list[int] = []
    passes = 0

    def note(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        sizes.append(batch.inputs["input_ids"].numel())
        return total

    def end(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == ends_at:
            raise _GoneError
        return total

    with monkeypatch.context() as noted:
        guarded.spoil(noted, note)
        guarded.run_to_the_end(settings("whole"))
    assert max(sizes) <= 200 and len(sizes) > 8
    ends_at = len(sizes) * 11 // 16
    with monkeypatch.context() as fatal, pytest.raises(_GoneError):
        guarded.spoil(fatal, end)
        guarded.run_to_the_end(settings("lost"))
    record = guarded.run_to_the_end(settings("lost"))
    assert [restart["step"] for restart in record["restarts"]] == [4]
    guarded.assert_same(tmp_path / "lost", tmp_path / "whole")


def test_an_inherited_checkpoint_goes_on_with_own_settings(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    parent = make(tiny_model, chat_file, tmp_path, "parent", weight_decay=0.1)
    settings = {"learning_rate": 3e-3, "beta2": 0.9, "weight_decay": 0.0}
    child = make(tiny_model, chat_file, tmp_path, "child", **settings)
    go(parent, 4)
    inherited = run_folder(child)
    inherited.upload(tmp_path / "parent")
    inherited.delete("run.json")
    go(child, 5)
    go(parent, 5)
    rates = [metrics(tmp_path / name)[-1]["learning_rate"] for name in ("parent", "child")]
    assert rates[1] == pytest.approx(3 * rates[0])
    child_losses, parent_losses = losses(tmp_path / "child"), losses(tmp_path / "parent")
    assert child_losses == parent_losses, "the fifth loss is that of the inherited weights"
    state = torch.load(tmp_path / "child/checkpoints/step-00000005/optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.0
        assert group["initial_lr"] == 3e-3
    steps = [entry["step"] for entry in state["state"].values()]
    assert steps and set(map(float, steps)) == {5.0}, "the moments restarted from zero"
