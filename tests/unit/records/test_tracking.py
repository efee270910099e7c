"""Trackers: what each is sent, once and in order, over restarts, failures and a driver's death.

The processes are real. Their client is a file `trackio.py` that stands in for the package and
writes down its calls; tests against the real packages are skipped where these are absent.
"""

import json
import os
import posixpath
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.recorded import RecordedProgress
from support.stored_runs import stored_run

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.recipe import recipe_from_dict
from finray.training.config.trackers import check_trackers, programs_of
from finray.training.records.trackers import TRACKERS
from finray.training.records.tracking import TrackerState, read_state, tracked
from finray.training.records.tracking_program import RunFeed
from finray.training.run import send_rest

CLIENT = """
import json, os, pathlib
LOG = pathlib.Path(os.environ["CALLS"])
def say(*what):
    with LOG.open("a") as stream:
        stream.write(json.dumps(what) + "\\n")
class Run:
    def __init__(self, name): self.name = name
    def log(self, values, step):
        if pathlib.Path(os.environ["CALLS"] + ".down").exists():
            raise OSError("the server is down, key wandb_v1_" + "a1B2" * 8)
        say("log", self.name, step, values)
    def log_artifact(self, path, name, type): say("add", self.name, name, type)
    def finish(self): say("finish", self.name)
def init(project, name, **how):
    say("init", name, how["resume"], how["group"], how["config"].get("model.base"))
    return Run(name)
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """A client that writes down its calls; returns what it was called with."""
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "trackio.py").write_text(CLIENT, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path / "client"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def read() -> list[Any]:
        file = tmp_path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return read


def add_lines(run: Path, *steps: int) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        for step in steps:
            stream.write(json.dumps({"step": step, "epoch": 0.1, "loss": 1.0 / (1 + step)}) + "\n")


def losses(calls: list[Any]) -> list[tuple[int, float]]:
    return [(call[2], call[3]["loss"]) for call in calls if call[0] == "log" and "loss" in call[3]]


def test_a_run_is_sent_and_resumed_under_its_id(
    tmp_path: Path, calls: Callable[[], list[Any]]
) -> None:
    run = stored_run(tmp_path, "run")
    (run / "report.html").write_text("page")
    folder = Folder(str(run))
    add_lines(run, 0, 1, 2)
    progress = RecordedProgress()
    with tracked(folder, ["trackio"], progress):
        add_lines(run, 3)
    first = calls()
    assert first[0] == ["init", "run", "never", None, "owner/base"]
    assert losses(first) == [(step, 1.0 / (1 + step)) for step in range(4)]
    assert first[-3:] == [
        ["add", "run", "report.html", "report"],
        ["add", "run", "recipe.yaml", "recipe"],
        ["finish", "run"],
    ]
    # A crash undoes steps 2 and 3, and the resumed run writes them again.
    (run / "metrics.jsonl").write_text("")
    add_lines(run, 0, 1, 2, 3, 4)
    with tracked(folder, ["trackio"], progress):
        pass
    again = calls()[len(first) :]
    assert again[0][:3] == ["init", "run", "allow"]
    assert losses(again) == [(4, 0.2)]
    assert not [text for text in progress.statuses if "log.to" in text]


def test_a_tracker_that_is_down_ends_in_one_warning_with_a_count(
    tmp_path: Path, calls: Callable[[], list[Any]]
) -> None:
    class Noted(RecordedProgress):
        def __init__(self) -> None:
            super().__init__()
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    run, progress = stored_run(tmp_path, "run"), Noted()
    down = tmp_path / "calls.down"
    down.touch()
    add_lines(run, 1, 2, 3)
    with tracked(Folder(str(run)), ["trackio"], progress):
        pass
    assert losses(calls()) == []
    (note,) = progress.notes
    assert note.startswith("log.to: trackio: OSError: the server is down")
    assert "3 lines of metrics.jsonl were not sent" in note and "a1B2a1B2" not in note
    down.unlink()
    recipe = recipe_from_dict(
        {
            "name": "run",
            "storage": str(tmp_path),
            "model": {"base": "owner/base"},
            "data": {"train": [{"path": "/rows.jsonl"}]},
            "log": {"to": ["trackio"]},
        }
    )
    send_rest(recipe, progress)
    send_rest(recipe, progress)
    assert sum(call[0] == "init" for call in calls()) == 2, "only once more, for what was missing"
    assert [step for step, _ in losses(calls())] == [1, 2, 3], "the next start sends them"
    assert len(progress.notes) == 1


def test_a_run_whose_driver_dies_stays_open(tmp_path: Path, calls: Callable[[], list[Any]]) -> None:
    run = stored_run(tmp_path, "run", status="running")
    add_lines(run, 1)
    program = [sys.executable, "-m", "finray.training.records.tracking_program"]
    child = subprocess.run(
        [*program, "trackio", str(run)], stdin=subprocess.DEVNULL, timeout=60, check=False
    )
    assert child.returncode == 0
    assert losses(calls()) == [(1, 0.5)] and ["finish", "run"] not in calls()


def test_a_process_that_ends_at_once_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = stored_run(tmp_path / "runs", "run")
    add_lines(run, 1)
    notes: list[str] = []
    progress = RecordedProgress()
    monkeypatch.setattr(progress, "note", notes.append)
    with tracked(Folder(str(run)), ["trackio"], progress):
        pass
    assert notes == [
        "log.to: trackio: its process ended; 1 lines of metrics.jsonl were not sent, and the run "
        "went on without it; the same command sends the rest later"
    ]


def test_a_sweep_is_a_parent_and_its_ended_trials_are_children(
    tmp_path: Path, calls: Callable[[], list[Any]]
) -> None:
    sweep = tmp_path / "sweep"
    rows = []
    for number, state in enumerate(["finished", "pruned", "running"]):
        add_lines(stored_run(sweep / "trials", f"trial-{number:04d}"), 1)
        values = [0.5] if state == "finished" else None
        rows.append({"number": number, "state": state, "values": values, "settings": {}})
    record = {
        "name": "sweep",
        "status": "finished",
        "settings": {"trials": 3},
        "trials": rows,
        "objectives": [{"metric": "eval_loss", "mode": "min"}],
    }
    (sweep / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    for _ in range(2):
        with tracked(
            Folder(str(sweep)), ["trackio"], RecordedProgress(), "finray.tuning.tracking_program"
        ):
            pass
    made = [(call[1], call[3]) for call in calls() if call[0] == "init"]
    children = [("sweep/trial-0000", "sweep"), ("sweep/trial-0001", "sweep")]
    assert made == [("sweep", "sweep"), *children, ("sweep", "sweep")]
    assert [call for call in calls() if call[0] == "log" and call[1] == "sweep"] == [
        ["log", "sweep", 0, {"eval_loss": 0.5}]
    ]


class MlflowError(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class MlflowServer:
    """Stands in for the package mlflow: it refuses what a server refuses."""

    def __init__(self) -> None:
        self.params: dict[str, dict[str, str]] = {}
        self.metrics: list[tuple[str, int]] = []
        self.failures = 0
        """Batches that are refused, before the others pass."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entities = SimpleNamespace(
            Param=lambda key, value: (key, value),
            Metric=lambda key, value, at, step: (key, step),
        )
        exceptions = SimpleNamespace(MlflowException=MlflowError)
        monkeypatch.setitem(sys.modules, "mlflow.exceptions", exceptions)  # type: ignore[arg-type]
        module = SimpleNamespace(MlflowClient=lambda: self, entities=entities)
        monkeypatch.setitem(sys.modules, "mlflow", module)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)  # type: ignore[arg-type]

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="0")

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        self.check(*tags)
        number = str(len(self.params))
        self.params[number] = {}
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def update_run(self, number: str, status: str) -> None:
        if number not in self.params:
            raise MlflowError

    def get_run(self, number: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params[number])))

    def log_batch(self, number: str, params: Any = (), metrics: Any = ()) -> None:
        self.check(*(key for key, _ in (*params, *metrics)))
        if self.failures:
            self.failures -= 1
            raise OSError("the server is down")
        for key, value in params:
            assert self.params[number].setdefault(key, value) == value, "no parameter changes"
        self.metrics += metrics

    @staticmethod
    def check(*names: str) -> None:
        for name in names:
            is_path = posixpath.normpath(name) == name and not name.startswith(("/", "."))
            assert re.fullmatch(r"[/\w.\- ]{1,250}", name) and is_path, name


@pytest.mark.parametrize("failures", [1, 2])
def test_mlflow_makes_one_run_and_takes_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Also where it fails right after a run is made, or between two batches of its parameters."""
    server = MlflowServer()
    server.install(monkeypatch)
    pattern = {r"^model\.layers.(\d+)": 4, r"^model\.layers.[\d+]": 8, "a//../b": 16, "x" * 400: 2}
    pattern |= {f"layer.{number}": number for number in range(150)}
    run = stored_run(tmp_path, "run", tags=["a+b:c"], recipe={"adapter": {"rank_pattern": pattern}})
    add_lines(run, 1)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 2, "reward/my@run": 0.5}) + "\n")
    folder = Folder(str(run))
    server.failures = failures
    for _ in range(failures):
        with pytest.raises(OSError, match="down"):
            RunFeed(folder, "mlflow", TRACKERS["mlflow"]).poll()
        assert read_state(folder, "mlflow").id == "0"
    RunFeed(folder, "mlflow", TRACKERS["mlflow"]).poll()
    assert list(server.params) == ["0"]
    sent = server.params["0"]
    assert sent["model.base"] == "owner/base" and len(sent) == 3 + len(pattern)
    ranks = [value for key, value in sent.items() if key.startswith("adapter.rank_pattern.")]
    assert sorted(ranks) == sorted(map(str, pattern.values()))
    assert server.metrics == [("loss", 1), ("reward/my_run", 2)]
    # A run that goes on with another setting that may change keeps the first.
    (run / "recipe.yaml").write_text("model: {base: other}\nlog: {every_steps: 5}\n")
    RunFeed(folder, "mlflow", TRACKERS["mlflow"]).poll()
    assert server.params["0"] == {**sent, "log.every_steps": "5"}
    # Another server, which does not know the run, gets all of it.
    other = MlflowServer()
    other.install(monkeypatch)
    other.params["of another run"] = {}
    feed = RunFeed(folder, "mlflow", TRACKERS["mlflow"])
    feed.poll()
    feed.poll()
    assert other.metrics == server.metrics and list(other.params) == ["of another run", "1"]


def test_values_of_one_step_come_from_several_lines() -> None:
    state = TrackerState()
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": None}]
    state.sent(state.unsent(lines[:1]))
    assert state.unsent(lines) == [(1, {"eval_loss": 3.0})]


def test_an_absent_package_or_key_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = "finray.training.config.trackers.find_spec"
    monkeypatch.setattr(module, lambda _: None)
    with pytest.raises(
        InputError, match=r"log.to: mlflow needs the package mlflow; install finray"
    ):
        check_trackers(["tensorboard", "mlflow"])
    monkeypatch.setattr(module, lambda _: object())
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match=r"log.to: wandb has no key; set WANDB_API_KEY"):
        check_trackers(["wandb"])
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 1\n")
    (tmp_path / "netrc").chmod(0o600)
    check_trackers(["wandb"])
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    assert programs_of(["tensorboard", "wandb", "wandb"]) == ["wandb"]


# the real packages


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        find_spec(package) is None, reason=f"the package {package} is not installed"
    )


def tracked_twice(run: Path, name: str) -> RecordedProgress:
    """A run that is tracked, stopped, and tracked to its end."""
    progress = RecordedProgress()
    (run / "report.html").write_text("page")
    for steps in ((1, 2), (3,)):
        add_lines(run, *steps)
        with tracked(Folder(str(run)), [name], progress):
            pass
    return progress


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real server on loopback."""
    import socket

    from mlflow import MlflowClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    store = [
        f"--backend-store-uri=sqlite:///{tmp_path}/db",
        f"--artifacts-destination={tmp_path}/a",
    ]
    command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=1", *store]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.3)
        run = stored_run(tmp_path, "run", tags=["baseline"])
        tracked_twice(run, "mlflow")
        client = MlflowClient(uri)
        number = read_state(Folder(str(run)), "mlflow").id
        assert number is not None
        history = client.get_metric_history(number, "loss")
        assert [(item.step, item.value) for item in history] == [(1, 0.5), (2, 1 / 3), (3, 0.25)]
        on_server = client.get_run(number)
        assert (
            on_server.info.status == "FINISHED"
            and on_server.data.params["model.base"] == "owner/base"
        )
        assert {item.path for item in client.list_artifacts(number)} == {
            "report.html",
            "recipe.yaml",
        }
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@needs("wandb")
def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: its files lie in the run's folder, both attempts under one id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = stored_run(tmp_path, "run")
    tracked_twice(run, "wandb")
    number = read_state(Folder(str(run)), "wandb").id
    files = sorted((run / "trackers" / "wandb").rglob("*.wandb"))
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2


@pytest.mark.slow
@needs("trackio")
def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = stored_run(tmp_path, "run")
    tracked_twice(run, "trackio")
    assert read_state(Folder(str(run)), "trackio").id == "run"
    script = (
        "import json, trackio\n"
        "logs = trackio.SQLiteStorage.get_logs('finray', 'run')\n"
        "print(json.dumps([[line['step'], line['loss']] for line in logs]))\n"
    )
    seen = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(seen.stdout.splitlines()[-1]) == [[1, 0.5], [2, 1 / 3], [3, 0.25]]


def test_every_name_in_the_recipe_has_a_class() -> None:
    from typing import get_args

    from finray.training.config.trackers import IN_FOLDER, TrackerName

    assert {*TRACKERS, IN_FOLDER} == set(get_args(TrackerName))
