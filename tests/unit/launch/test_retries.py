"""The failures that a run survives."""

import pickle
from pathlib import Path

import pytest
from torch.distributed import DistBackendError

from finray.training.common.background import Stop
from finray.training.common.errors import RunError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.engine.failures import note_step
from finray.training.engine.hangs import STOPPED, hang_repeats_as
from finray.training.engine.task import WorkerResult, WorkerTask, repeats_as
from finray.training.launch.retries import AttemptEndedError, FailurePolicy, run_with_retries
from finray.training.records import checkpoint


def test_only_failures_without_progress_count(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "checkpoints"))

    def save(step: int) -> None:
        staged = tmp_path / str(step)
        staged.mkdir()
        manifest = checkpoint.make_manifest(staged, 0, 1, {})
        checkpoint.publish(staged, folder / checkpoint.checkpoint_name(step), 0, manifest)

    policy = FailurePolicy(folder, 2)
    assert [policy.should_retry() for _ in range(3)] == [True, True, False]
    policy = FailurePolicy(folder, 2)
    assert policy.should_retry() and policy.should_retry()
    save(10)
    assert policy.should_retry() and policy.should_retry()
    save(20)
    assert [policy.should_retry() for _ in range(3)] == [True, True, False]
    assert not FailurePolicy(folder, 0).should_retry()


class Fails:
    """A launcher whose attempts fail as given, and then finish."""

    max_failures = 3

    def __init__(self, *failures: str | None) -> None:
        self.stop = Stop()
        self.left = list(failures)

    def attempt(self, task: WorkerTask) -> WorkerResult:
        if not self.left:
            return WorkerResult(status="finished", error=None, exit_code=0)
        raise AttemptEndedError("worker 1 failed: no", repeats_as=self.left.pop(0))

    def wait_until_ready(self, progress: object) -> None:
        """It is always ready."""


def not_needed() -> None:
    raise AssertionError("no data is damaged")


def test_the_same_error_in_the_same_step_is_not_retried(tmp_path: Path) -> None:
    task = WorkerTask(recipe={"optim": {}}, run=str(tmp_path), prepared="")
    for failures in (("a", "b", "a"), (None, None, None), ("a", None, "a")):
        assert run_with_retries(task, Fails(*failures), SILENT, not_needed)["status"] == "finished"
    launcher = Fails("a", "a", "a")
    with pytest.raises(RunError, match="no; it happened again after a restart"):
        run_with_retries(task, launcher, SILENT, not_needed)
    assert launcher.left == ["a"]


def noted(error: Exception, step: int | None) -> str | None:
    """As it comes from another process."""
    note_step(error, step)
    return repeats_as(pickle.loads(pickle.dumps(error)))


def test_which_errors_are_the_same() -> None:
    first = noted(ValueError("bad row"), 7)
    assert first is not None and first == noted(ValueError("bad row"), 7)
    others = [
        noted(ValueError("bad row"), 8),
        noted(ValueError("bad row"), None),
        noted(ValueError("bad line"), 7),
        noted(TypeError("bad row"), 7),
    ]
    assert None not in others and len({first, *others}) == 5
    for error in (
        OSError("gone"),
        ConnectionError("reset"),
        DistBackendError("NCCL"),
        MemoryError(),
    ):
        assert noted(error, 7) is None
    assert repeats_as(ValueError("from elsewhere")) is None


def test_which_hangs_are_the_same() -> None:
    end = "did not end within 300 s; /run/stacks/rank-0-step-7{}.txt shows where"
    first, again = (hang_repeats_as(f"step 7 {end.format(name)}") for name in ("", "-2"))
    assert first == again != hang_repeats_as(f"step 8 {end}")
    assert hang_repeats_as(f"worker 1 {STOPPED}: step 7 {end}") is None
