"""Workers as processes of this machine: their results, and processes that end without one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.forking import WORKER, WORKER_TITLE, ForkServer, before_all_else, fork_workers
from support.harness import wait_until
from support.recorded import RecordedProgress

from finray.cluster.gpus import Gpu, usable_gpus
from finray.training.common.background import Stop
from finray.training.common.errors import RunError
from finray.training.common.progress import SILENT
from finray.training.config.sections import ScaleSettings
from finray.training.engine.task import WorkerTask
from finray.training.launch import local_workers
from finray.training.launch.local_workers import LocalLauncher
from finray.training.launch.resources import WorkerRequest
from finray.training.launch.retries import run_with_retries

DEADLINE = 300.0


@pytest.fixture
def task(tmp_path: Path) -> WorkerTask:
    """A task without prepared data, so that a worker fails once it has loaded the libraries."""
    recipe = {
        "name": "run",
        "model": {"base": "/m"},
        "data": {"train": [{"path": "/rows.jsonl"}]},
        "storage": str(tmp_path),
    }
    return WorkerTask(recipe=recipe, run=f"{tmp_path}/run", prepared=f"{tmp_path}/gone")


@pytest.fixture
def forked(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked with their libraries loaded, instead of started."""
    monkeypatch.setattr(subprocess, "Popen", fork_workers(fork_server))


@contextmanager
def started(
    env: dict[str, str], **scale: Any
) -> Iterator[tuple[LocalLauncher, list[psutil.Process]]]:
    """Two workers; afterwards their processes must have ended."""
    settings, others = ScaleSettings(workers=2, **scale), worker_processes()
    request = WorkerRequest(2, 2, 1.0, 0.0)
    with LocalLauncher(settings, request, 2, Stop(), env, verbose=False) as workers:
        yield workers, two_beside(others)
    assert not any(child.is_running() for child in worker_processes() if child not in others)


def two_beside(others: list[psutil.Process]) -> list[psutil.Process]:
    """The two workers; a forked one takes its name when it begins."""
    deadline = time.monotonic() + DEADLINE
    while len(own := [child for child in worker_processes() if child not in others]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(own) == 2
    return own


def prepare_again() -> None:
    raise AssertionError("the data is not damaged")


def worker_processes() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if WORKER in child.cmdline() or child.name() == WORKER_TITLE
    ]


def logs_of(message: str) -> str:
    """The contents of the log folder that the message names."""
    folder = Path(message.partition("the workers' output: ")[2].rstrip(")"))
    assert folder.stat().st_mode & 0o077 == 0, "others can read it"
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_a_fault_that_a_restart_would_repeat_is_handed_on(task: WorkerTask) -> None:
    progress = RecordedProgress()
    with started({}) as (workers, _):
        outcome = run_with_retries(task, workers, progress, prepare_again)
    assert outcome["status"] == "failed" and outcome["exit_code"] == 1
    assert "no longer exists" in str(outcome["error"])
    assert progress.statuses == []


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_a_worker_that_ends_without_a_word(task: WorkerTask) -> None:
    """A second attempt starts both workers again."""
    progress = RecordedProgress()
    with started({}, max_failures=1) as (workers, (_, second)):
        second.send_signal(signal.SIGSEGV)
        outcome = run_with_retries(task, workers, progress, prepare_again)
    (line,) = progress.statuses
    assert line.startswith("restarting the workers: worker 1 was ended by SIGSEGV")
    logs_of(line)  # kept, though the run went on
    assert outcome["status"] == "failed"


def test_the_message_of_a_failed_worker_names_its_output(task: WorkerTask, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['finray.training.engine.worker'] = None\n", encoding="utf-8"
    )
    with (
        started({"PYTHONPATH": before_all_else(tmp_path)}, max_failures=0) as (workers, _),
        pytest.raises(RunError, match=r"worker 0 failed: ModuleNotFoundError: import of") as error,
    ):
        run_with_retries(task, workers, SILENT, prepare_again)
    assert logs_of(str(error.value)).count("Traceback") == 2


@pytest.mark.slow
def test_a_file_of_the_current_folder_is_not_taken_for_a_library(
    task: WorkerTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemError('not this one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with started({}, max_failures=0) as (workers, _):
        assert "no longer exists" in str(
            run_with_retries(task, workers, SILENT, prepare_again)["error"]
        )


def test_workers_end_when_their_driver_does(tmp_path: Path) -> None:
    """That holds too while they load their libraries."""
    child = local_workers.start_process(dict(os.environ), tmp_path / "log.txt")
    assert child.stdin is not None and child.stdout is not None
    child.stdin.close()
    assert child.wait(DEADLINE) == -signal.SIGKILL
    assert child.stdout.read() == b""
    child.stdout.close()


@pytest.mark.long
def test_what_a_worker_started_ends_with_it(task: WorkerTask, tmp_path: Path) -> None:
    """That holds too for a child that keeps the worker's pipes open after the worker has ended."""
    (tmp_path / "sitecustomize.py").write_text(
        "import subprocess\nsubprocess.Popen(['sleep', '314.15'])\nprint('not an answer')",
        encoding="utf-8",
    )
    env = {"PYTHONPATH": before_all_else(tmp_path)}
    with started(env, max_failures=0) as (workers, (first, second)):
        wait_until(lambda: bool(first.children() and second.children()), "what they start")
        left = [*first.children(), *second.children()]
        second.kill()
        with pytest.raises(RunError, match="worker 1 was ended by SIGKILL"):
            run_with_retries(task, workers, SILENT, prepare_again)
    assert [child.cmdline() for child in left if is_alive(child)] == []


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


POOL = """
import multiprocessing, threading
from queue import SimpleQueue
from finray.training.launch import worker_process as worker

worker._leave_signals_to_driver()
commands, reply = worker._open_channels()
listen = dict(target=worker._read_commands, args=(commands, SimpleQueue(), None))
threading.Thread(**listen, daemon=True).start()
print("for the log")
with multiprocessing.get_context("fork").Pool(2) as pool:
    reply({"status": "error", "error": str(pool.map(abs, [-1, -2]))})
threading.Event().wait()
"""


def test_a_reward_may_fork(tmp_path: Path) -> None:
    """The worker's pipes and signal handlers do not disturb its children."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-c", POOL], stdin=pipe, stdout=pipe, stderr=pipe, process_group=0
    )
    assert child.stdin is not None and child.stdout is not None
    assert json.loads(child.stdout.readline()) == {"status": "error", "error": "[1, 2]"}
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    _, printed = child.communicate(timeout=DEADLINE)  # which closes its stdin
    assert child.returncode == -signal.SIGKILL
    assert printed == b"for the log\n"


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_a_worker_that_is_stopped_before_it_meets_the_others(
    task: WorkerTask, tmp_path: Path
) -> None:
    """The other one says where it waits."""
    with started({}, hang_timeout=0.5, max_failures=0) as (workers, (_, second)):
        second.suspend()
        with pytest.raises(RunError, match="worker 1 is stopped, by SIGSTOP or a debugger"):
            run_with_retries(task, workers, SILENT, prepare_again)
    stacks = "".join(path.read_text("utf-8") for path in (tmp_path / "run/stacks").iterdir())
    assert "join_group" in stacks and "This worker cannot give its stacks." in stacks


def test_a_stop_before_the_workers_train(task: WorkerTask) -> None:
    with started({}) as (workers, _):
        workers.stop.requested.set()
        began = time.monotonic()
        assert run_with_retries(task, workers, SILENT, prepare_again)["status"] == "stopped"
        assert time.monotonic() - began < DEADLINE


@pytest.mark.parametrize(
    ("gpus", "requested", "devices", "visible"),
    [
        (0.0, "auto", ["cpu", "cpu"], None),
        (0.0, 0, ["cpu", "cpu"], ""),
        (1.0, "auto", ["cuda:0", "cuda:1"], None),
        (1.0, 1, ["cuda:0", "cuda:1"], None),
    ],
)
def test_each_worker_has_a_device(
    gpus: float,
    requested: Any,
    devices: list[str],
    visible: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    begun: list[tuple[list[str], str | None]] = []

    class Noted:
        def __init__(self, devices: list[str], env: dict[str, str], logs: Path | None) -> None:
            begun.append((devices, env.get("CUDA_VISIBLE_DEVICES")))

        def end(self) -> None:
            """Do nothing."""

    monkeypatch.setattr(local_workers, "_WorkerGroup", Noted)
    scale = ScaleSettings(workers=2, gpus_per_worker=requested)
    with LocalLauncher(scale, WorkerRequest(2, 2, 1.0, gpus), 2, Stop(), {}, verbose=False):
        assert begun == [(devices, visible)]


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,3", 2),
        ("", 0),
        ("-1", 0),
        ("GPU-5a", 1),
        ("0,1,2,3,4", 4),
        ("MIG-1,MIG-2", 1),
        ("1,-1,2", 1),
    ],
)
def test_gpus_that_the_user_hides_do_not_count(
    visible: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finray.cluster.gpus.gpus_here", lambda: (Gpu("T4", 2**34),) * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_gpus() == count
