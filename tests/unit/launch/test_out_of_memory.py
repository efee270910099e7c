"""Out of memory: the microbatch is halved, and the steps stay the same."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock, patch

import pytest
import torch
from support.guarded import assert_same, losses, recipe, run_to_the_end, spoil
from support.trials import reports_of, trial_of
from torch.distributed import DistBackendError

from finray.training.common.errors import RunError
from finray.training.common.progress import SILENT
from finray.training.config.recipe import Recipe
from finray.training.data.batching import Batch
from finray.training.engine.failures import memory_request
from finray.training.engine.task import WorkerTask
from finray.training.launch.in_process import InProcessLauncher
from finray.training.launch.retries import _Remedies
from finray.training.models.devices import Room
from finray.training.models.out_of_memory import in_fitting_parts, is_out_of_memory
from finray.training.objectives.cross_entropy import TokenObjective
from finray.training.objectives.objective import Loss
from finray.training.run import _placed, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


def holds(rows: int, after_calls: int = 0) -> Callable[[Batch, torch.Tensor], torch.Tensor]:
    """Imitate a device that fits only `rows` rows, from some forward pass on."""
    calls = [0]

    def change(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > after_calls and len(batch.rows) > rows:
            raise torch.OutOfMemoryError(MESSAGE)
        return total

    return change


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.long
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


def test_a_budget_of_tokens_is_halved(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to a row of full length; the next start goes on with what was recorded."""

    def settings(name: str, tokens: int) -> Recipe:
        sizes = {"micro_batch_size": None, "micro_batch_tokens": tokens, "max_steps": 4}
        return recipe(tiny_model, chat_file, tmp_path, name, **sizes)

    def change(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        if batch.inputs["input_ids"].numel() > 150:
            raise torch.OutOfMemoryError(MESSAGE)
        return total

    run_to_the_end(settings("small", 150))
    run_to_the_end(settings("whole", 800))
    with monkeypatch.context() as full:
        spoil(full, change)
        record = run_to_the_end(settings("run", 600))
    assert_same(tmp_path / "run", tmp_path / "small")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=1e-4)
    assert record["micro_batch_tokens"] == 150
    assert "micro_batch_tokens 300 instead of 600" in record["restarts"][0]["reason"]
    spoil(monkeypatch, holds(0))
    with pytest.raises(RunError, match=r"with optim.micro_batch_tokens 96 already"):
        run_to_the_end(settings("never", 250))


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
    with monkeypatch.context() as recomputed:
        spoil(recomputed, holds(0))
        with pytest.raises(RunError, match=r"To save memory: a shorter data.max_length, "):
            run_to_the_end(settings.with_placement(3, True))
    spoil(monkeypatch, holds(1))
    assert len(run_to_the_end(settings)["restarts"]) == 2


def test_what_a_worker_has_not_is_not_halved(tiny_model: Path, chat_file: Path) -> None:
    """Two rows each for four workers: half of 8 would change nothing."""
    whole = recipe(tiny_model, chat_file, tiny_model, "run", batch_size=8, micro_batch_size=8)
    scale = whole.scale.model_copy(update={"workers": 4})
    values = whole.model_copy(update={"scale": scale}).model_dump(mode="json")
    task = cast(WorkerTask, {"recipe": values, "run": "memory://none", "prepared": ""})
    request = memory_request(torch.OutOfMemoryError(MESSAGE), "step", 1)
    remedies = _Remedies(Mock(), lambda: None, Mock())
    with patch("finray.training.launch.retries.update_run"):
        after = remedies.apply(task, request)
    assert after["recipe"]["optim"]["micro_batch_size"] == 1


SIGNS = {
    "cuda": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "torch": torch.OutOfMemoryError(MESSAGE),
    "driver": RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    "runtime": RuntimeError("CUDA failure 2: cudaErrorMemoryAllocation"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "cublas start": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cubla"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cudnn start": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "cusolver": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"),
    "nccl": DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error, NCCL version 2.27.3\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
    "nccl buffers": DistBackendError("Last error:\nFailed to CUDA calloc async 608 bytes"),
    "bitsandbytes": RuntimeError("Error out of memory at line 380 in file /src/csrc/pythonIn"),
    "hip": RuntimeError("HIP error: hipErrorOutOfMemory"),
    "rocm": RuntimeError("HSA_STATUS_ERROR_OUT_OF_RESOURCES: The runtime failed to allocate"),
    "miopen": RuntimeError("MIOpen Error: miopenStatusAllocFailed"),
    "rocblas": RuntimeError("rocblas_status_memory_error"),
    "xpu": RuntimeError("level_zero backend failed with UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB)"),
    "host": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
    "c++": RuntimeError("std::bad_alloc"),
    "python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"),
}
OTHERS = (
    RuntimeError("expected all tensors to be on the same device"),
    RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RunError("out of memory with one of the completions at a time"),
)


@pytest.mark.parametrize("name", SIGNS)
def test_the_signs_of_a_lack_of_memory(name: str) -> None:
    assert is_out_of_memory(SIGNS[name])
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = SIGNS[name]
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_parts_are_halved_until_they_fit() -> None:
    """The results are those of the items, in their order."""
    sizes: list[int] = []

    def compute(part: Sequence[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError(MESSAGE)
        return [item * item for item in part]

    results, size = in_fitting_parts(range(11), 10, compute, "answers", "less helps")
    assert results == [item * item for item in range(11)]
    assert size == 3 and sizes == [10, 5, 3, 3, 3, 2]

    def nothing_fits(part: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError(MESSAGE)

    with pytest.raises(RunError, match=r"with one of the answers at a time \(CUDA .*; less helps"):
        in_fitting_parts(range(4), 4, nothing_fits, "answers", "less helps")


@pytest.mark.long
def test_an_evaluation_gets_smaller_batches_and_the_step_stays(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result equals that of a run with memory; the microbatch is not touched."""
    original = TokenObjective.loss

    def loss(self: Any, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        if not model.training and len(batch.rows) > 1:
            raise RuntimeError(str(SIGNS["cublas"]))
        return original(self, model, batch, measured)

    def run(name: str) -> dict[str, Any]:
        values = recipe(tiny_model, chat_file, tmp_path, name, max_steps=6).model_dump(mode="json")
        values["data"]["eval"] = [{"path": str(chat_file)}]
        return run_to_the_end(Recipe.model_validate(values))

    whole = run("whole")
    monkeypatch.setattr(TokenObjective, "loss", loss)
    record = run("run")
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert record["evaluation_parts"] == 4 and "micro_batch_size" not in record
    reasons = [restart["reason"] for restart in record["restarts"]]
    assert [re.sub(r"\(.*\)", "()", reason) for reason in reasons] == [
        f"out of memory () in the evaluation; continuing with its batches divided by {parts}"
        for parts in (2, 4)
    ]
    name = "eval_loss"
    assert record["metrics"][name] == pytest.approx(whole["metrics"][name], abs=1e-5)


def test_a_model_that_cannot_be_loaded_is_not_loaded_again(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def load(*_: Any, **__: Any) -> None:
        calls[0] += 1
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr("finray.training.engine.worker.load_model", load)
    with pytest.raises(RunError, match=r"^out of memory \(CUDA .*\) while loading, where a .*nf4"):
        run_to_the_end(recipe(tiny_model, chat_file, tmp_path, "run"))
    assert calls == [1] and record_of(tmp_path / "run")["status"] == "failed"


def test_what_the_memory_decides_is_kept_for_the_next_start(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Decided before the first start by the GPU; another GPU changes nothing."""
    values = recipe(tiny_model, chat_file, tmp_path, "run", max_steps=4).model_dump(mode="json")
    values["optim"]["micro_batch_size"] = "auto"
    values["model"]["gradient_checkpointing"] = "auto"
    settings = Recipe.model_validate(values)
    fixed = recipe(tiny_model, chat_file, tmp_path, "fixed", max_steps=4, micro_batch_size=8)
    run_to_the_end(fixed)
    large, small = (InProcessLauncher(room=Room(size)) for size in (2**40, 2**20))
    record = train(settings, large)
    assert record["decided"] == {"micro_batch_size": 8, "gradient_checkpointing": False}
    assert_same(tmp_path / "run", tmp_path / "fixed")
    longer = settings.model_copy(
        update={"optim": settings.optim.model_copy(update={"max_steps": 6, "schedule": "constant"})}
    )
    assert _placed(longer, record, small.room, SILENT)[1] == record["decided"]
    without = _placed(settings, None, None, SILENT)[1]
    assert without == {"micro_batch_size": 4, "gradient_checkpointing": False}
    assert _placed(fixed.with_placement(2, True), None, large.room, SILENT)[1] == {}


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
