"""Progress: everything a run writes is shown once, in order; plain lines without a terminal."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finray.cluster.screens import progress, progress_display
from finray.cluster.screens.progress import MetricsTail, ProgressWatcher, Speed
from finray.training.common.storage import Folder
from finray.training.records.run_folder import write_run


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run")).create()


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False), out


def append(folder: Folder, *records: dict[str, Any]) -> None:
    assert folder.local is not None
    with (folder.local / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing came in 300 s"
        time.sleep(0.01)


@pytest.fixture
def wait_for_poll(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until the folder, as it is now, has been read."""
    polls: list[None] = []
    original = progress._WatchedRun.poll

    def poll(run: Any, quiet: bool = False) -> None:
        original(run, quiet)
        polls.append(None)

    def wait() -> None:
        before = len(polls)
        until(lambda: len(polls) >= before + 2)  # the next one may have begun already

    monkeypatch.setattr(progress._WatchedRun, "poll", poll)
    return wait


def test_the_last_lines_are_shown_at_the_end(folder: Folder) -> None:
    console, out = plain()
    with ProgressWatcher(folder, console, poll_seconds=60):
        write_run(folder, {"total_steps": 100})
        append(folder, {"step": 10, "loss": 1.5, "seconds": 5.0})
        append(folder, {"step": 10, "eval_loss": 1.25, "exact_match": 0.5})
        append(
            folder,
            {"step": 20, "loss": 1.2345, "learning_rate": 1.9e-4, "tokens_per_second": 5120.4,
             "seconds": 10.0},
        )  # fmt: skip
    lines = out.getvalue().splitlines()
    assert "step 10  held-out loss 1.250  exact match 50.0%" in lines
    assert lines[-1] == "step 20/100  loss 1.234  lr 1.9e-04  5,120 tok/s  40s left"
    assert "\x1b" not in out.getvalue()


def test_the_last_save_and_failed_saves_are_shown(folder: Folder) -> None:
    console, out = plain()
    with ProgressWatcher(folder, console, poll_seconds=0.01):
        write_run(folder, {"last_saved_step": 10, "save_error": None, "save_wait_seconds": 0.1})
        append(folder, {"step": 12, "loss": 1.0})
        until(lambda: "step 12" in out.getvalue())
        error = "step 20: no\nspace"
        write_run(folder, {"last_saved_step": 10, "save_error": error, "save_wait_seconds": 9.2})
        until(lambda: "has waited" in out.getvalue())
    lines = out.getvalue().splitlines()
    assert "step 12  loss 1.000  saved 10" in lines
    assert lines.count(
        "a save failed (step 20: no space); training continues, last saved: step 10"
    ) == 1  # fmt: skip
    assert sum("for checkpoints to be stored" in line for line in lines) == 1


def test_lines_come_while_the_run_goes_on(folder: Folder) -> None:
    console, out = plain()
    with ProgressWatcher(folder, console, poll_seconds=0.01):
        append(folder, {"step": 0, "eval_loss": 3.0})
        until(lambda: "step 0  held-out loss 3.000" in out.getvalue())
        append(folder, {"step": 1, "eval_loss": 2.0})
        until(lambda: "step 1  held-out loss 2.000" in out.getvalue())


def test_plain_lines_are_few_but_every_evaluation_is_shown(folder: Folder) -> None:
    console, out = plain()
    started = time.monotonic()
    with ProgressWatcher(folder, console, poll_seconds=0.01):
        for step in range(1, 101):
            append(folder, {"step": step, "loss": 1.0}, {"step": step, "eval_loss": 1.0})
            time.sleep(0.005)
    seconds = time.monotonic() - started
    lines = out.getvalue().splitlines()
    assert sum("held-out" in line for line in lines) == 100
    others = [line for line in lines if "held-out" not in line]
    assert len(others) <= seconds / progress_display.PLAIN_SECONDS + 2
    assert others[-1] == "step 100  loss 1.000"


def test_phases_are_shown_and_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_display, "PLAIN_SECONDS", 3600.0)  # whatever the machine's load
    console, out = plain()
    with ProgressWatcher(console=console) as watcher:
        watcher.status("preparing data: pack 1/8")
        watcher.status("preparing data: pack 2/8")
        watcher.status("loading\x1b[31m the\nmodel")
    assert out.getvalue() == "preparing data: pack 1/8\nloading[31m the model\n"


def test_an_earlier_part_is_not_shown_again(folder: Folder) -> None:
    append(folder, {"step": 10, "eval_loss": 2.0}, {"step": 10, "loss": 2.0, "seconds": 5.0})
    write_run(folder, {"total_steps": 100, "restarts": [{"step": 5, "reason": "old"}]})
    console, out = plain()
    with ProgressWatcher(console=console, poll_seconds=0.01) as watcher:
        watcher.run_started(folder)
        append(folder, {"step": 20, "loss": 1.0, "seconds": 15.0})
        restarts = [{"step": 5, "reason": "old"}, {"step": 10, "reason": "a node\ndied"}]
        notices = ["4 tensors are not used: visual"]
        write_run(folder, {"total_steps": 100, "restarts": restarts, "notices": notices})
        until(lambda: "restart" in out.getvalue())
    text = out.getvalue()
    assert "held-out" not in text
    assert "4 tensors are not used: visual" in text
    assert "old" not in text
    assert "restart at step 10: a node died" in text
    assert "step 20/100  loss 1.000  1m00s left" in text


def test_skipped_steps_are_shown(folder: Folder) -> None:
    console, out = plain()
    with ProgressWatcher(folder, console, poll_seconds=0.01):
        append(folder, {"step": 10, "loss": None, "grad_norm": None, "skipped": 10})
        append(folder, {"step": 20, "loss": 0.0, "grad_norm": None, "unrewarded": 3})
        until(lambda: "no completion" in out.getvalue())
    changed = "of the last steps changed nothing"
    assert f"step 10: 10 {changed}: not finite" in out.getvalue()
    assert f"step 20: 3 {changed}: no completion got a reward" in out.getvalue()


def test_evaluations_are_not_repeated_when_the_file_is_cut(
    folder: Folder, wait_for_poll: Callable[[], None]
) -> None:
    console, out = plain()
    with ProgressWatcher(folder, console, poll_seconds=0.01):
        append(folder, {"step": 10, "eval_loss": 2.0}, {"step": 20, "eval_loss": 1.0})
        until(lambda: "step 20" in out.getvalue())
        folder.write("metrics.jsonl", b'{"step": 10, "eval_loss": 2.0}\n')
        wait_for_poll()
        append(folder, {"step": 20, "eval_loss": 1.5})
        until(lambda: "1.500" in out.getvalue())
    evaluations = [line for line in out.getvalue().splitlines() if "held-out" in line]
    assert evaluations == [
        "step 10  held-out loss 2.000",
        "step 20  held-out loss 1.000",
        "step 20  held-out loss 1.500",
    ]


def test_a_damaged_or_missing_run_does_not_end_the_display(
    folder: Folder, wait_for_poll: Callable[[], None]
) -> None:
    console, out = plain()
    with ProgressWatcher(folder, console, poll_seconds=0.01):
        folder.write("run.json", b"not json")
        append(folder, {"step": 1, "eval_loss": 1.0})
        wait_for_poll()
        write_run(folder, {})
        until(lambda: "held-out" in out.getvalue())


def test_an_error_inside_comes_out_and_the_display_ends(folder: Folder) -> None:
    console, out = plain()
    with pytest.raises(RuntimeError, match="boom"), ProgressWatcher(folder, console):
        append(folder, {"step": 3, "loss": None})
        raise RuntimeError("boom")
    assert out.getvalue().splitlines()[-1] == "step 3  loss nan"


def test_a_terminal_gets_one_live_line(folder: Folder) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, _environ={"TERM": "xterm"})
    write_run(folder, {"total_steps": 40})
    with ProgressWatcher(folder, console, poll_seconds=0.01) as watcher:
        watcher.status("loading the model")
        until(lambda: "loading the model" in out.getvalue())
        append(folder, {"step": 20, "loss": 1.5, "learning_rate": 1e-4, "seconds": 10.0})
        until(lambda: "20/40" in out.getvalue())
        append(folder, {"step": 20, "eval_loss": 1.25}, {"step": 40, "loss": 0.5})
    text = out.getvalue()
    assert "held-out loss 1.250" in text
    final = text[text.rfind("step 40/40") :]
    assert "━" in final
    assert "loss 0.500" in final
    assert "finishing" not in final
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_dumb_terminal_gets_plain_lines(folder: Folder) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, _environ={"TERM": "dumb"})
    with ProgressWatcher(folder, console) as watcher:
        watcher.status("loading")
    assert "\x1b" not in out.getvalue()
    assert "loading" in out.getvalue()


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder(str(tmp_path)).create()
    store = Folder(f"mock://{tmp_path}").create()
    assert store.local is None
    return store


def test_tail_gives_each_whole_line_once(store: Folder) -> None:
    tail = MetricsTail(store)
    assert tail.poll() == ([], False)
    store.write("metrics.jsonl", b'{"step": 1}\n{"st')
    assert tail.poll() == ([{"step": 1}], False)
    assert tail.poll() == ([], False)
    store.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')
    assert tail.poll() == ([{"step": 2}], False)


def test_tail_starts_again_when_the_file_is_another_one(store: Folder) -> None:
    tail = MetricsTail(store)
    store.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')
    tail.poll()
    store.write("metrics.jsonl", b'{"step": 1}\n')
    assert tail.poll() == ([{"step": 1}], True), "shorter"
    store.write("metrics.jsonl", b'{"step": 7}\n{"step": 8}\n{"step": 9}\n')
    assert tail.poll() == ([{"step": 7}, {"step": 8}, {"step": 9}], True), "cut, and grown since"


def test_tail_reads_new_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    opened: list[Any] = []

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file, self.read_bytes = file, 0

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read(self) -> bytes:
            content = bytes(self.file.read())
            self.read_bytes += len(content)
            return content

    class Filesystem:
        type_name = "local"

        def open_input_file(self, path: str) -> Counting:
            opened.append(Counting(real.open_input_file(path)))
            return opened[-1]  # type: ignore[no-any-return]

    real = folder.filesystem
    monkeypatch.setattr(Folder, "filesystem", Filesystem())
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' * 10_000)
    tail = MetricsTail(folder)
    assert len(tail.poll()[0]) == 10_000
    append(folder, {"step": 2})
    assert tail.poll()[0] == [{"step": 2}]
    assert opened[-1].read_bytes < 200


def test_speed_measures_the_latest_steps() -> None:
    speed = Speed()
    assert speed.seconds_per_step() is None
    speed.add(10, 20.0)
    assert speed.seconds_per_step() == 2.0
    for step in range(20, 1000, 10):
        speed.add(step, 20.0 + (step - 10) * 0.5)
    assert speed.seconds_per_step() == pytest.approx(0.5)
    speed.add(500, 265.0)
    assert speed.seconds_per_step() is None, "after a restart two steps are needed"
    speed.add(510, 267.0)
    assert speed.seconds_per_step() == pytest.approx(0.2)
    speed.add(520, None)
    assert speed.seconds_per_step() == pytest.approx(0.2)
