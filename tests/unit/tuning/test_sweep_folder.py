"""Which files of its trials a sweep keeps, and a sweep.json that is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from finray.cluster.cli.main import main
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


TRIAL = {
    "number": 0,
    "state": "finished",
    "settings": {"adapter.rank": 8},
    "tokens": 100,
    "values": [0.5],
    "latest": None,
    "error": None,
    "reason": None,
}
SWEEP: dict[str, Any] = {
    "name": "search",
    "status": "finished",
    "settings": {"trials": 1},
    "best": [0],
    "objectives": [{"metric": "eval_loss", "mode": "min"}],
    "trials": [TRIAL],
    "excluded": {"count": 0, "first": []},
    "prunes": False,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JSON object"),
        (b"[1]", "expected a JSON object"),
        *((SWEEP | {key: None}, f"{key} is missing") for key in SWEEP),
        *(
            (
                SWEEP | {"trials": [{k: v for k, v in TRIAL.items() if k != key}]},
                f"trials: {key} is",
            )
            for key in TRIAL
        ),
        (SWEEP | {"excluded": {}}, "excluded: count is missing"),
        (SWEEP | {"status": 3}, "status: expected text, not 3"),
        (SWEEP | {"trials": ["x"]}, "trials: expected an object, not 'x'"),
        (SWEEP | {"trials": [TRIAL | {"tokens": "x"}]}, "trials: tokens: expected a number"),
        (SWEEP | {"format": 99}, "a newer finray wrote this file"),
    ],
)
def test_a_damaged_sweep_is_shown_as_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(SWEEP), encoding="utf-8")
    assert main(["tune", "show", str(tmp_path)]) == 0
    assert "sweep search finished: 1 finished" in capsys.readouterr().out
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert main(["tune", "show", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: {message}" in line
    assert line.endswith(("; restore it, or move the folder away", "; upgrade finray"))
