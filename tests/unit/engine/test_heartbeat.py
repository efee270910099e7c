"""What counts as a hang, what is left alone, and what a hanging worker leaves."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.guarded import recipe, run_to_the_end, spoil
from support.harness import wait_until

from finray.training.common.errors import RunError
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.batching import Batch
from finray.training.engine import heartbeat as module
from finray.training.engine.hangs import STOPPED, WatchedProcess, report_hang
from finray.training.engine.heartbeat import (
    ALLOWANCES,
    Beat,
    Heartbeat,
    Phase,
    Watch,
    expect_beats,
    read_beat,
)
from finray.training.records.checkpoint import Choice
from finray.training.records.recorder import RunRecorder
from finray.training.records.run_folder import read_run

SHORT = 0.2
LONG = 300.0
Clock = list[float]
"""The seconds that have passed, as one number."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "worker-0"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes when a test says so, whatever the machine's load."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


def hang_of(watch: Watch, clock: Clock, seconds: float) -> Beat | None:
    """The hang that the watch sees within some seconds."""
    for _ in range(round(seconds / 0.005)):
        if (beat := watch.hung()) is not None:
            return beat
        clock[0] += 0.005
    return None


def test_a_step_that_does_not_end(file: Path, clock: Clock) -> None:
    expect_beats(file, SHORT)
    watch = Watch(file)
    with Heartbeat(file, SHORT) as heartbeat:
        for step in (1, 2, 3):
            heartbeat.enter("step", step)
            assert hang_of(watch, clock, SHORT / 2) is None
        hung = hang_of(watch, clock, LONG)
    assert hung is not None and (hung.phase, hung.step, hung.limit) == ("step", 3, SHORT)
    assert str(hung) == "step 3"


def test_a_worker_that_never_begins(file: Path, clock: Clock) -> None:
    expect_beats(file, 0.02)
    hung = hang_of(Watch(file), clock, LONG)
    assert hung is not None and str(hung) == "loading the libraries"


def test_progress_inside_a_phase(file: Path, clock: Clock) -> None:
    expect_beats(file, 0.02)
    watch = Watch(file)
    with Heartbeat(file, 0.02) as heartbeat:
        heartbeat.enter("evaluation", 7)
        for _ in range(4):
            assert hang_of(watch, clock, 0.02 * ALLOWANCES["evaluation"] / 2) is None
            heartbeat.beat()
        assert hang_of(watch, clock, LONG) == read_beat(file)


def test_what_does_not_count(file: Path, clock: Clock) -> None:
    """The time for which the watching process was stopped, and a run without a limit."""
    expect_beats(file, 10.0)
    watch = Watch(file)
    assert watch.hung() is None
    for seconds, counts in ((500.0, True), (0.9, True), (500.0, False)):
        clock[0] += seconds
        assert watch.hung(counts) is None
    for _ in range(79):
        clock[0] += 1.0
        hung = watch.hung()
    assert hung is not None and hung.phase == "start"
    expect_beats(file, None)
    for _ in range(1000):
        clock[0] += 1.0
        assert watch.hung() is None


def limit_of(file: Path, heartbeat: Heartbeat, phase: Phase) -> float:
    heartbeat.enter(phase, 1)
    return read_beat(file).limit


def test_auto_goes_by_the_longest_of_each_phase(file: Path, clock: Clock) -> None:
    expect_beats(file, "auto")
    with Heartbeat(file, "auto") as heartbeat:
        assert limit_of(file, heartbeat, "step") == 300.0
        for seconds, limit in ((5.0, 300.0), (42.0, 420.0), (1.0, 420.0)):
            clock[0] += seconds
            assert limit_of(file, heartbeat, "step") == limit
        clock[0] += 41.0
        assert limit_of(file, heartbeat, "rollout") == 1800.0
        clock[0] += 200.0
        assert limit_of(file, heartbeat, "step") == 420.0
        for _ in range(20):
            clock[0] += 40.0
            limit = limit_of(file, heartbeat, "step")
        assert limit == 400.0
        assert limit_of(file, heartbeat, "rollout") == 2000.0


def test_every_phase_has_a_multiple_of_the_setting(file: Path) -> None:
    expect_beats(file, 2.0)
    with Heartbeat(file, 2.0) as heartbeat:
        for phase, share in ALLOWANCES.items():
            assert limit_of(file, heartbeat, phase) == 2.0 * share >= 2.0
            assert read_beat(file).phase == phase


HANGS = """
import re, signal, sys, threading
from pathlib import Path
from finray.training.engine.heartbeat import Heartbeat

def hanging_call():
    print("ready", flush=True)
    {call}

with Heartbeat(Path(sys.argv[1]), 5.0) as heartbeat:
    heartbeat.enter("step", 13)
    hanging_call()
"""
BACKTRACKS = 're.match(r"(a|a)+$", "a" * 64 + "b")'
WAITS = "threading.Event().wait()"


@pytest.fixture
def children() -> Iterator[list["subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("call", [BACKTRACKS, WAITS])
def test_the_stacks_of_a_worker(
    call: str, file: Path, tmp_path: Path, children: list["subprocess.Popen[bytes]"]
) -> None:
    """Also while a call holds Python's lock. The next attempt records them once."""
    run = Folder(str(tmp_path / "run"))
    expect_beats(file, 5.0)
    program = [sys.executable, "-c", HANGS.format(call=call), str(file)]
    children.append(subprocess.Popen(program, stdout=subprocess.PIPE))
    assert children[0].stdout is not None and children[0].stdout.readline() == b"ready\n"
    worker = WatchedProcess(children[0].pid, file)
    for name in ("stacks/rank-1-step-13.txt", "stacks/rank-1-step-13-2.txt"):
        message = report_hang(run, {1: worker}, read_beat(file))
        assert f"step 13 did not end within 5 s; {run / name} shows where" in message
        assert "scale.hang_timeout" in message
        text = run.read(name).decode()
        assert text.partition("\n")[0] in message and "hanging_call" in text
    os.kill(worker.pid, signal.SIGSTOP)
    wait_until(lambda: STOPPED in report_hang(run, {1: worker}, read_beat(file)), "it stops")
    assert_recorded_once(run)


def assert_recorded_once(run: Folder) -> None:
    settings = Recipe.model_validate(
        {"name": "x", "model": {"base": "/x"}, "data": {"train": [{"path": "/x"}]}}
    )
    cause = f"step 13 hung, see {run}/stacks/rank-1-step-13.txt"
    for reason in (cause, None):
        RunRecorder(run, settings, 10).start(Choice("step-00000010", 10, ()), 2, {}, reason)
    record = read_run(run)
    assert record is not None
    first, second = (restart["reason"] for restart in record["restarts"])
    for name in ("rank-1-step-13.txt", "rank-1-step-13-2.txt"):
        assert first.count(f"stacks/{name}") == 1 and name not in second


GUARDED = """
import re, sys, threading
from finray.training.common.storage import Folder
from finray.training.engine.guard import guarded

def hanging_reward():
    {call}

with guarded(Folder(sys.argv[1]), 0, 1.0, in_process=True) as heartbeat:
    heartbeat.enter("step", 7)
    hanging_reward()
"""


@pytest.mark.long
@pytest.mark.parametrize(("call", "code"), [(BACKTRACKS, -signal.SIGKILL), (WAITS, 1)])
def test_a_run_in_the_commands_own_process_ends_as_failed(
    call: str, code: int, tmp_path: Path
) -> None:
    """By itself, unless a call holds Python's lock."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED.format(call=call), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )
    assert done.returncode == code
    (stacks,) = (tmp_path / "stacks").iterdir()
    message = f"step 7 did not end within 1 s; {stacks} shows where"
    assert f"finray: {message}" in done.stderr
    assert "hanging_reward" in stacks.read_text(encoding="utf-8")
    record = read_run(Folder(str(tmp_path)))
    assert record is not None and record["finished_at"]
    assert record["status"] == "failed" and record["error"].startswith(message)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_reports_its_phases(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With held-out rows, two steps and a save after each."""
    phases: list[tuple[str, int]] = []
    enter = Heartbeat.enter

    def noted(self: Heartbeat, phase: Phase, step: int = 0) -> None:
        phases.append((phase, step))
        enter(self, phase, step)

    monkeypatch.setattr(Heartbeat, "enter", noted)
    settings = recipe(tiny_model, chat_file, tmp_path, "run", max_steps=3)
    data = settings.data.model_copy(update={"eval": settings.data.train})
    saves = settings.checkpoint.model_copy(update={"every_steps": 2})
    changed = {"data": data, "checkpoint": saves, "eval": settings.eval.model_copy()}
    run_to_the_end(settings.model_copy(update=changed))
    assert phases == [
        *(("loading", 0), ("evaluation", 0)),
        *(("first step", 1), ("step", 2), ("save", 2), ("step", 3)),
        *(("evaluation", 3), ("save", 3), ("save", 3)),
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_code_that_ends_the_process_does_not_end_the_run_as_finished(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exits(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        sys.exit(0)

    spoil(monkeypatch, exits)
    with pytest.raises(RunError, match=r"ended the process: sys.exit\(0\)"):
        run_to_the_end(recipe(tiny_model, chat_file, tmp_path, "run"))
    record = read_run(Folder(str(tmp_path / "run")))
    assert record is not None and record["status"] == "failed"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_without_hang_timeout_is_not_watched(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr("finray.training.engine.guard._start", started.append)
    settings = recipe(tiny_model, chat_file, tmp_path, "run", max_steps=1)
    scale = settings.scale.model_copy(update={"hang_timeout": None})
    assert run_to_the_end(settings.model_copy(update={"scale": scale}))["status"] == "finished"
    assert started == []
