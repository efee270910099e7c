"""The number of failures that a run survives."""

from pathlib import Path

from finray.training.common.storage import Folder
from finray.training.launch.retries import FailurePolicy
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
