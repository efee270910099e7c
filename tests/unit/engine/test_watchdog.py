"""What the watchdog times, what it ignores, and what it writes."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.guarded import recipe, run_to_the_end, spoil

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.batching import Batch
from finray.training.engine import watchdog
from finray.training.engine.watchdog import Watchdog, write_stacks
from finray.training.launch.in_process import InProcessContext
from finray.training.records.checkpoint import Choice
from finray.training.records.recorder import RunRecorder
from finray.training.records.run_folder import read_run

SHORT = 0.2
LONG = 30.0


def test_a_step_that_does_not_end() -> None:
    calls: list[float] = []
    hung = threading.Event()

    def on_hang(seconds: float) -> None:
        calls.append(seconds)
        hung.set()

    with Watchdog(SHORT, on_hang) as dog:
        dog.disarm()
        dog.arm()
        assert hung.wait(LONG)
    assert len(calls) == 1 and calls[0] >= SHORT


def test_what_is_left_alone() -> None:
    """It ignores the first step, work after a step, and steps that end in time."""
    calls: list[float] = []
    with Watchdog(SHORT, calls.append) as dog:
        time.sleep(3 * SHORT)
        dog.disarm()
        time.sleep(3 * SHORT)
        for _ in range(8):
            dog.arm()
            time.sleep(SHORT / 4)
        dog.disarm()
    assert calls == []
    with Watchdog(None, calls.append) as dog:
        dog.arm()
        time.sleep(3 * SHORT)
    assert calls == []


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
    """The next attempt records them once."""
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
    settings = Recipe.model_validate(
        {"name": "x", "model": {"base": "/x"}, "data": {"train": [{"path": "/x"}]}}
    )
    for _ in range(2):
        RunRecorder(Folder(str(tmp_path)), settings, 10).start(
            Choice("step-00000010", 10, ()), 2, {}, None
        )
    record = read_run(Folder(str(tmp_path)))
    assert record is not None
    first, second = (restart["reason"] for restart in record["restarts"])
    assert name in first and name not in second


class _Abandoned(Exception):
    """Raised instead of ending the process."""


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_is_watched(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass that never ends; the message names the file with its stack."""
    messages: list[str] = []
    over = threading.Event()
    calls = [0]

    def abort(self: InProcessContext, message: str) -> None:
        messages.append(message)
        over.set()

    def waits_forever(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 9:
            over.wait(LONG)
            raise _Abandoned
        return total

    monkeypatch.setattr(InProcessContext, "abort", abort)
    spoil(monkeypatch, waits_forever)
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    scale = settings.scale.model_copy(update={"hang_timeout": 2.0})
    with pytest.raises(_Abandoned):
        run_to_the_end(settings.model_copy(update={"scale": scale}))
    (message,) = messages
    (stacks,) = (tmp_path / "run" / "stacks").iterdir()
    assert str(stacks) in message and "scale.hang_timeout" in message
    assert "waits_forever" in stacks.read_text(encoding="utf-8")


def test_a_local_run_ends_as_failed(tmp_path: Path) -> None:
    program = (
        "import sys, threading; from finray.training.launch.in_process import InProcessContext; "
        "from finray.training.common.background import Stop; "
        "from finray.training.common.storage import Folder; "
        "context = InProcessContext(Folder(sys.argv[1]), Stop()); "
        "threading.Thread(target=context.abort, args=('step 7 did not end',)).start(); "
        "threading.Event().wait()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1 and "finray: step 7 did not end" in done.stderr
    record = read_run(Folder(str(tmp_path)))
    assert record is not None and record["finished_at"]
    assert (record["status"], record["error"]) == ("failed", "step 7 did not end")
