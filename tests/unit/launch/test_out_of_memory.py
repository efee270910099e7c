"""Out of memory: the microbatch is halved, and the steps stay the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.guarded import assert_same, losses, recipe, run_to_the_end, spoil
from support.trials import reports_of, trial_of

from finray.training.common.errors import RunError
from finray.training.data.batching import Batch
from finray.training.engine.failures import is_out_of_memory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


def holds(rows: int, after_calls: int = 0) -> Callable[[Batch, torch.Tensor], torch.Tensor]:
    """Imitate a device that fits only `rows` rows, from some forward pass on."""
    calls = [0]

    def change(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > after_calls and len(batch.inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError(MESSAGE)
        return total

    return change


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return values


def test_the_microbatch_is_halved(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 8 to 2: all losses and weights equal those of a recipe with 2."""

    def run(name: str, rows: int) -> dict[str, Any]:
        settings = {"micro_batch_size": rows, "max_steps": 6}
        return run_to_the_end(recipe(tiny_model, chat_file, tmp_path, name, **settings))

    run("small", 2)
    run("large", 8)
    spoil(monkeypatch, holds(2))
    record = run("run", 8)
    assert_same(tmp_path / "run", tmp_path / "small")
    large = losses(tmp_path / "large")
    assert losses(tmp_path / "run") == pytest.approx(large, abs=1e-4)
    assert record["micro_batch_size"] == 2
    reasons = [restart["reason"] for restart in record["restarts"]]
    assert [restart["step"] for restart in record["restarts"]] == [1, 1]
    assert "micro_batch_size 4 instead of 8" in reasons[0] and "2 instead of 4" in reasons[1]
    assert MESSAGE in reasons[0]


def test_it_goes_on_from_the_checkpoint(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 11 does not fit; the run continues with step 9, after the checkpoint of step 8."""
    run_to_the_end(recipe(tiny_model, chat_file, tmp_path, "whole"))
    spoil(monkeypatch, holds(2, after_calls=20))
    record = run_to_the_end(recipe(tiny_model, chat_file, tmp_path, "run"))
    assert [restart["step"] for restart in record["restarts"]] == [11, 8]
    actual, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert list(actual) == list(range(1, 13))
    assert actual == pytest.approx(expected, abs=1e-4)
    assert {step: actual[step] for step in range(1, 9)} == {s: expected[s] for s in range(1, 9)}


def test_with_one_row_it_says_what_to_change(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command later starts with the reduced microbatch."""
    settings = recipe(tiny_model, chat_file, tmp_path, "run", micro_batch_size=3, max_steps=4)
    with monkeypatch.context() as full:
        spoil(full, holds(0))
        with pytest.raises(RunError, match=r"step 1: .*gradient_checkpointing.*max_length"):
            run_to_the_end(settings)
    record = record_of(tmp_path / "run")
    assert record["status"] == "failed" and record["micro_batch_size"] == 1
    assert len(record["restarts"]) == 2  # 3, 2, 1
    spoil(monkeypatch, holds(1))
    assert len(run_to_the_end(settings)["restarts"]) == 2


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError(MESSAGE), True),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("expected all tensors to be on the same device"), False),
    ],
)
def test_which_errors_are_meant(error: RuntimeError, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


def test_another_error_is_not_tried_again(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    spoil(monkeypatch, change)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_to_the_end(recipe(tiny_model, chat_file, tmp_path, "run"))
    assert "restarts" not in record_of(tmp_path / "run")


def test_a_trial_in_a_slot_too(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process continues with the smaller microbatch, and the trial does not fail."""
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    spoil(monkeypatch, holds(2, after_calls=20))
    with trial_of(settings, tmp_path / "sweep") as trial:
        reports = reports_of(trial)
    assert reports[-1]["status"] == "finished", reports[-1]
    steps = [report["measures"]["step"] for report in reports[:-1]]
    assert steps == [*range(1, 11), *range(9, 13)]
    assert record_of(tmp_path / "run")["micro_batch_size"] == 2
