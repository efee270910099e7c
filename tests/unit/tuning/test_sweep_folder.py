"""Which files of its trials a sweep keeps."""

from pathlib import Path

import pytest

from finray.training.common.storage import Folder
from finray.tuning.sweep_folder import drop_weights, trial_folder


@pytest.mark.parametrize("is_best", [True, False])
def test_weights_that_cannot_be_deleted_now_are_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_best: bool
) -> None:
    """While a worker writes a checkpoint, its folder cannot be deleted."""
    sweep = Folder(str(tmp_path))
    trial = trial_folder(sweep, 3)
    for name in ("checkpoints/step-5", "adapter"):
        (trial / name).create().write("weights", b"0")
    trial.write("run.json", b"{}")
    delete = Folder.delete

    def refuse(folder: Folder, name: str = "") -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Folder, "delete", refuse)
    drop_weights(sweep, 3, is_best)
    assert trial.exists("checkpoints/step-5/weights")
    monkeypatch.setattr(Folder, "delete", delete)
    drop_weights(sweep, 3, is_best)
    assert not trial.exists("checkpoints") and trial.exists("run.json")
    assert trial.exists("adapter/weights") == is_best
