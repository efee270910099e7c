"""The watchdog: what it times, what it leaves alone, and what it writes."""

import threading
import time
from pathlib import Path

import pytest

from finray.training import watchdog
from finray.training.books import Books
from finray.training.checkpoint import Choice
from finray.training.recipe import Recipe
from finray.training.run_folder import read_run
from finray.training.storage import Folder
from finray.training.watchdog import Watchdog, write_stacks

SHORT = 0.2
LONG = 30.0


def test_a_step_that_does_not_end() -> None:
    told: list[float] = []
    hung = threading.Event()

    def on_hang(seconds: float) -> None:
        told.append(seconds)
        hung.set()

    with Watchdog(SHORT, on_hang) as dog:
        dog.disarm()
        dog.arm()
        assert hung.wait(LONG)
    assert len(told) == 1 and told[0] >= SHORT


def test_what_is_left_alone() -> None:
    """The first step, what follows a step, and steps that end."""
    told: list[float] = []
    with Watchdog(SHORT, told.append) as dog:
        time.sleep(3 * SHORT)
        dog.disarm()
        time.sleep(3 * SHORT)
        for _ in range(8):
            dog.arm()
            time.sleep(SHORT / 4)
            dog.disarm()
    assert told == []
    with Watchdog(None, told.append) as dog:
        dog.arm()
        time.sleep(3 * SHORT)
    assert told == []


def test_auto_goes_by_the_longest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog("auto", lambda _: None)
    assert dog.limit == 300.0
    for seconds, limit in ((5.0, 300.0), (42.0, 420.0), (1.0, 420.0)):
        dog.arm()
        clock[0] += seconds
        dog.disarm()
        assert dog.limit == limit
    for _ in range(20):
        dog.arm()
        clock[0] += 40.0
        dog.disarm()
    assert dog.limit == 400.0


def test_the_stacks_of_all_threads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And the next attempt tells of them, once."""
    waits = threading.Event()

    def hanging_collective() -> None:
        waits.wait(LONG)

    thread = threading.Thread(target=hanging_collective)
    thread.start()
    name = write_stacks(Folder(str(tmp_path)), 1, 13)
    waits.set()
    thread.join()
    assert name == "stacks/rank-1-step-13.txt"
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert "hanging_collective" in text and "test_the_stacks_of_all_threads" in text
    assert "hanging_collective" in capfd.readouterr().err
    recipe = Recipe.model_validate(
        {"name": "x", "model": {"base": "/x"}, "data": {"train": [{"path": "/x"}]}}
    )
    for _ in range(2):
        Books(Folder(str(tmp_path)), recipe, 10).open(Choice("step-00000010", 10, ()), 2, {})
    record = read_run(Folder(str(tmp_path)))
    assert record is not None
    first, second = (one["reason"] for one in record["restarts"])
    assert name in first and name not in second
