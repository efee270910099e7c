"""Errors of the sweep itself, such as a failing storage, are not attributed to a trial."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.config.recipe import recipe_from_dict
from finray.training.engine.context import STOP_FILE
from finray.tuning import run
from finray.tuning.plan import Plan
from finray.tuning.progress import Ending, SweepProgress
from finray.tuning.ray_tune import _ConductedPruning, _ConductedSearch, _Guard
from finray.tuning.run import _SweepRun
from finray.tuning.sweep_folder import Record, read_sweep


class Broken:
    """A conductor whose methods all raise."""

    is_finished = True

    def __init__(self) -> None:
        self.interrupts = 0

    def interrupt(self) -> None:
        self.interrupts += 1

    def next_trial(self) -> None:
        raise ZeroDivisionError("first")

    def report(self, *_: Any) -> bool:
        raise ZeroDivisionError("second")

    def finish_trial(self, *_: Any) -> None:
        raise ZeroDivisionError("third")


def test_an_error_of_the_conductor_ends_the_sweep_and_is_raised() -> None:
    conductor: Any = Broken()
    guard = _Guard(conductor)
    search = _ConductedSearch(conductor, lambda assignment: cast(Any, assignment), guard)
    search._numbers["a"] = 0
    assert search.suggest("a") == search.FINISHED
    report = {"tokens": 1, "value": 0.5, "number": 0, "is_last": False}
    assert _ConductedPruning(conductor, guard).on_trial_result(None, None, report) == "CONTINUE"
    search.on_trial_complete("a", {})
    assert conductor.interrupts == 1
    with pytest.raises(ZeroDivisionError, match="first"):
        guard.raise_error()


def test_without_an_error_nothing_is_raised() -> None:
    conductor: Any = Broken()
    guard = _Guard(conductor)
    with guard():
        pass
    guard.raise_error()
    assert conductor.interrupts == 0


class FailingFolder(Folder):
    """A storage whose first `failures` writes fail."""

    failures = 0

    def write(self, name: str, content: bytes) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("the store is away")
        super().write(name, content)


class Recorded:
    """The parts of a study, its file and a conductor that a sweep needs for its records."""

    seconds = 1.0

    def rows(self) -> list[dict[str, Any]]:
        return [{"number": 0}]

    def best(self) -> list[int]:
        return []

    def upload(self) -> None:
        """Do nothing: the study lies on this machine."""


class Texts(SweepProgress):
    """Collects status lines and the texts of ended trials, in order."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def status(self, text: str) -> None:
        self.texts.append(text)

    def trial_ended(self, ending: Ending, record: Record) -> None:
        self.texts.append(ending.text)


@pytest.fixture
def tuning(tmp_path: Path) -> Any:
    made: Any = object.__new__(_SweepRun)
    made._folder = FailingFolder(str(tmp_path))
    made._record = {"trials": [], "best": []}
    made._progress = Texts()
    made._study = made._file = made._conductor = Recorded()
    made._plan = cast(Plan, None)
    return made


def test_records_that_cannot_be_written_are_written_later(tuning: Any) -> None:
    tuning._folder.failures = 1
    tuning._changed(Ending(0, "finished", "loss 0.1"))
    assert read_sweep(tuning._folder) is None
    assert [text.partition(": ")[2] or text for text in tuning._progress.texts] == [
        "the store is away",
        "loss 0.1",
    ]
    tuning._changed(None)
    assert (read_sweep(tuning._folder) or {})["trials"] == [{"number": 0}]


def test_the_stop_file_is_written_again_until_it_succeeds(
    tuning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_RETRY_SECONDS", 0.01)
    tuning._folder.failures = 3
    tuning._write_stop_file()
    deadline = time.monotonic() + 300
    while not tuning._folder.exists(STOP_FILE):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert tuning._folder.failures == 0


@pytest.mark.parametrize(
    ("metric", "tokens", "key", "evaluation", "is_said"),
    [
        ("eval_loss", (90, 80, 90), "data.curate", [], True),
        ("exact_match", (90, 80), "data.curate.0.min_tokens", [], True),
        ("eval_loss", (90, 80), "data", ["eval.jsonl"], True),
        ("eval_loss", (90, 80), "data.eval.0.path", ["eval.jsonl"], True),
        ("eval_loss", (90, 80), "data.curate", ["eval.jsonl"], False),
        ("eval_loss", (90, 80), "data.max_length", [], False),
        ("eval_loss", (90, 80), "data.max_length", ["eval.jsonl"], False),
        ("eval_loss", (90, 90), "data.curate", [], False),
        ("loss", (90, 80), "data.curate", [], False),
        ("eval_loss", (None, None), "data.curate", [], False),
    ],
)
def test_an_objective_on_different_rows_is_said(
    metric: str, tokens: tuple[int | None, ...], key: str, evaluation: list[str], is_said: bool
) -> None:
    plan: Any = SimpleNamespace(
        metrics=[Metric(metric, "min")],
        recipe=SimpleNamespace(data=SimpleNamespace(eval=evaluation)),
        space=SimpleNamespace(keys=["optim.learning_rate", key]),
    )
    prepared: Any = [
        SimpleNamespace(manifest=SimpleNamespace(eval=n and SimpleNamespace(tokens=n)))
        for n in tokens
    ]
    said = run._different_rows(plan, prepared)
    assert (said is not None) == is_said
    assert said is None or f"{metric} is measured on different held-out rows (80 to 90 to" in said


def test_all_trials_start_from_the_same_files(
    tuning: Any, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    recipe = recipe_from_dict(
        {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "/x"}]}}
    )
    assert tuning._with_noted_files(recipe) == recipe
    tuning._changed(None)
    tuning._record = read_sweep(tuning._folder)  # as another driver does
    assert tuning._with_noted_files(recipe) == recipe
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(InputError, match=r"rms_norm_eps: 1e-06 before, 0\.5 now"):
        tuning._with_noted_files(recipe)
