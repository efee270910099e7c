"""A real head with token authentication, and runs that are submitted to it as jobs."""

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml
from support.forking import SERVER, ForkServer
from support.harness import Finray, losses, reached, record, wait_until

pytestmark = pytest.mark.ray
SECRETS = {
    "HF_TOKEN": "hf_" + "q7Zx" * 8,
    "WANDB_API_KEY": "4c81" * 10,
    "AWS_SECRET_ACCESS_KEY": "wJ/alrXU+tnFEMI" * 2,
}
CPUS = 4
STEPS = 120


class Cluster:
    """The head, and the command with its address."""

    def __init__(self, finray: Finray, address: str, folder: Path) -> None:
        self.finray = finray
        self.address = address
        self.folder = folder
        """Ray's own files."""

    def job(self, verb: str, *arguments: str | Path, code: int = 0) -> str:
        return self.finray.run("job", verb, *arguments, "--address", self.address, code=code)

    def status(self, name: str) -> dict[str, object]:
        output = self.job("status", name, "--json")
        values: dict[str, object] = json.loads(output[output.index("{") :])
        return values

    def rays_own_notes(self, token: str) -> str:
        """Entry point, metadata and runtime environment of all jobs, as anybody can read them."""
        request = Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        with urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content.decode()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    chat_file: Path,
    fork_server: ForkServer,
) -> Iterator[Cluster]:
    finray = Finray(tmp_path_factory.mktemp("finray"), tiny_model, chat_file, fork_server)
    home = tmp_path_factory.mktemp("home")
    ray = Path(tempfile.mkdtemp(prefix="finray-"))  # a socket's path must be short
    head, dashboard, agent, client = _free_ports(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        # Without `SERVER` Ray starts its workers as users' do: with the finray that was uploaded.
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", SERVER)
        for name in names:
            patch.delenv(name, raising=False)
        options = {
            "num-cpus": CPUS,
            "temp-dir": ray,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
        }
        try:
            output = finray.run(
                *("cluster", "up", "--port", str(head), "--dashboard-port", str(dashboard)),
                *(f"--start-option=--{name}={value}" for name, value in options.items()),
                fresh=True,
            )
            assert f"--address={socket.gethostname()}" not in output and f":{head}" in output
            yield Cluster(finray, f"http://127.0.0.1:{dashboard}", ray)
        finally:
            finray.run("cluster", "down", fresh=True)
            assert "no head" in finray.run("cluster", "status")
            finray.end_all()
            shutil.rmtree(ray, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]


def test_a_run_is_stopped_goes_on_and_is_fetched(cluster: Cluster) -> None:
    """And is submitted once, however often its recipe is given."""
    finray = cluster.finray
    settings: dict[str, object] = {"name": "once", "scale__workers": 2}
    run = finray.folder / "runs" / "once"
    settings |= {"optim__micro_batch_size": 1, "checkpoint__every_steps": 300}
    recipe = finray.recipe(**settings, optim__max_steps=STEPS)
    assert "submitted once" in cluster.job("submit", recipe)
    assert "is already " in cluster.job("submit", recipe)
    other = finray.recipe(**settings, optim__max_steps=STEPS + 1)
    assert "other settings" in cluster.job("submit", other, code=2)
    recipe = finray.recipe(**settings, optim__max_steps=STEPS)
    wait_until(lambda: reached(run, 5), "step 5")
    cluster.job("stop", "once")
    saved = record(run)["step"]
    assert record(run)["status"] == "stopped" and 5 <= saved < STEPS
    assert cluster.status("once")["status"] == "STOPPED"

    assert "submitted once again, as once~2" in cluster.job("submit", recipe)
    log = cluster.job("logs", "once", "--follow")
    assert f"{STEPS}/{STEPS}" in log and "once finished" in log
    assert cluster.status("once")["status"] == "SUCCEEDED"
    assert record(run)["restarts"][0]["step"] == saved
    assert sorted(losses(run)) == list(range(1, STEPS + 1))

    assert "gets its results" in cluster.job("submit", recipe)
    listed = cluster.job("list", "--json")
    assert [job["id"] for job in json.loads(listed)] == ["once", "once~2"]
    target = finray.folder / "fetched"
    cluster.job("fetch", "once", "--to", target)
    assert record(target)["status"] == "finished" and record(target)["step"] == STEPS
    for name in ("adapter/adapter_model.safetensors", "report.html", "metrics.jsonl"):
        assert (target / name).read_bytes() == (run / name).read_bytes()
    assert str(finray.data) not in (run / "recipe.yaml").read_text(encoding="utf-8")
    assert_no_secrets(cluster, run, target, listed + log)


def assert_no_secrets(cluster: Cluster, run: Path, target: Path, texts: str) -> None:
    """Neither in a file of the run or of Ray's logs, nor in what anybody can read of the jobs."""
    token = (Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
    secrets = {**SECRETS, "Ray's token": token}
    for folder in (run, target, cluster.folder / "session_latest" / "logs"):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            content = file.read_bytes()
            assert not [name for name, value in secrets.items() if value.encode() in content], file
    texts += cluster.rays_own_notes(token)
    assert '"submission_id"' in texts
    assert not [name for name, value in secrets.items() if value in texts]


@pytest.mark.slow
def test_a_sweep_stops_and_the_same_submission_goes_on(cluster: Cluster) -> None:
    finray = cluster.finray
    base = finray.recipe(name="base", data__holdout=0.1, optim__max_steps=STEPS)
    sweep = finray.folder / "sweep.yaml"
    search = {"optim.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    values = {"name": "swept", "recipe": base.name, "search": search, "trials": 2, "concurrency": 1}
    sweep.write_text(yaml.safe_dump(values), encoding="utf-8")
    folder = finray.folder / "runs" / "swept"
    trial = folder / "trials" / "trial-0000"
    assert "submitted swept" in cluster.job("submit", sweep)
    assert "is already " in cluster.job("submit", sweep)
    wait_until(lambda: reached(trial, 10), "step 10 of the first trial")
    cluster.job("stop", "swept")
    assert cluster.status("swept")["status"] == "STOPPED"
    assert json.loads((folder / "sweep.json").read_text())["status"] == "stopped"

    output = cluster.job("submit", sweep, "--wait")
    assert "submitted swept again, as swept~2" in output and "sweep swept finished" in output
    assert record(trial)["restarts"][0]["step"] >= 5
    assert sorted(losses(trial)) == list(range(1, STEPS + 1))
    assert "finished already" in cluster.job("submit", sweep)
    assert "trial 0" in cluster.job("logs", "swept")

    target = finray.folder / "fetched-sweep"
    cluster.job("fetch", "swept", "--to", target)
    for name in ("adapter/adapter_model.safetensors", "report.html", "best.yaml", "optuna.db"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    assert record(target / "trials" / "trial-0000")["status"] == "finished"
    assert not list(target.rglob("checkpoints"))
    assert "sweep swept finished" in finray.run("tune", "show", target)
    assert str(finray.data) not in (folder / "best.yaml").read_text(encoding="utf-8")


def test_what_never_fits_is_reported_at_once(cluster: Cluster) -> None:
    recipe = cluster.finray.recipe(name="wide", scale__workers=8)
    output = cluster.job("submit", recipe, "--wait", code=2)
    assert f"scale.workers={CPUS} would fit" in output
    assert cluster.status("wide")["exit_code"] == 2
    assert not (cluster.finray.folder / "runs" / "wide" / "run.json").exists()


def test_a_wrong_and_a_missing_token(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    output = cluster.job("list", code=2)
    assert "refuses the token" in output and "0" * 64 not in output
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    output = cluster.job("list", code=2)
    assert "requires a token" in output and "scp" in output


def test_doctor(cluster: Cluster, tmp_path: Path) -> None:
    arguments = ("cluster", "doctor", "--address", cluster.address, "--storage")
    output = cluster.finray.run(*arguments, tmp_path, fresh=True)
    assert "written by every node, read by all" in output and "requires a token" in output
    (tmp_path / "file").write_bytes(b"")
    assert "FAIL" in cluster.finray.run(*arguments, tmp_path / "file", code=2)
