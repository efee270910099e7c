"""Runs on several hosts, each with an address of its own, that are cut off, killed and drained.

A head, two nodes and a laptop from which all is submitted, through Ray Jobs with a token.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest
import yaml
from support.forking import ForkServer
from support.harness import Finray, losses, metrics, reached, record, wait_until
from support.hosts import Host, Network, why_not
from support.spoiled import spoil_loss

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
PORT, DASHBOARD = 6379, 8265
STEPS = 3000
"""More than a run takes until all has happened to it; it is stopped then."""
COMPARED = 400
MICROBATCH = 8
SLOW = "if calls[-1] and len(batch.rows) > 1: time.sleep(0.1)"
"""A step takes long and computes little: a host that starts beside it has the machine's cores."""
ENVIRONMENT = {
    # A host that is cut off is missed within seconds, not within half a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


class Cluster:
    """The hosts, and the command on the laptop."""

    def __init__(self, network: Network, model: Path, data: Path) -> None:
        self.folder = network.folder / "shared"
        self.folder.mkdir()
        self.head, self.laptop = network.host("head"), network.host("laptop")
        self.nodes = {name: network.host(name) for name in ("alpha", "beta")}
        self.admin = self._finray(self.head, model, data)
        self.finray = self._finray(self.laptop, model, data)

    def _finray(self, host: Host, model: Path, data: Path) -> Finray:
        def place(command: list[str]) -> list[str]:
            return host.command(*command, folder=self.folder)

        return Finray(self.folder / host.name, model, data, place=place)

    def start(self) -> None:
        for finray in (self.admin, self.finray):
            finray.folder.mkdir()
        options = ("--dashboard-host=0.0.0.0", "--num-cpus=0")
        output = self.admin.run("cluster", "up", *(f"--start-option={one}" for one in options))
        assert f"--address={self.head.address}:{PORT}" in output
        for name in self.nodes:
            self.join(name)

    def join(self, name: str) -> None:
        """What the line says that `cluster up` prints."""
        node = self.nodes[name]
        address = f"--address={self.head.address}:{PORT}"
        env = {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
        slow = spoil_loss(self.folder, SLOW)
        node.ray("start", "--disable-usage-stats", "--num-cpus=1", address, env=env | slow)

    def drain(self, name: str, seconds: int) -> None:
        """What a cloud does before it takes a spot instance."""
        reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        deadline = ("--deadline-remaining-seconds", str(seconds))
        address = f"--address={self.head.address}:{PORT}"
        env = {"RAY_AUTH_MODE": "token"}
        node = ("--node-id", self.node_id(name))
        self.head.ray("drain-node", address, *node, *reason, *deadline, env=env)

    def node_id(self, name: str) -> str:
        output = self.head.run(
            sys.executable,
            "-c",
            "import json, ray; ray.init('auto', log_to_driver=False, logging_level='ERROR');"
            "print(json.dumps([[n['NodeManagerAddress'], n['NodeID']] for n in ray.nodes()"
            " if n['Alive']]))",
            env={"RAY_AUTH_MODE": "token"},
        )
        ids = dict(json.loads(output.strip().splitlines()[-1]))
        return str(ids[self.nodes[name].address])

    def job(self, verb: str, *arguments: str | Path, code: int = 0) -> str:
        address = f"http://{self.head.address}:{DASHBOARD}"
        return self.finray.run("job", verb, *arguments, "--address", address, code=code)

    def recipe(self, name: str, steps: int, **changes: object) -> Path:
        settings: dict[str, object] = {
            "name": name,
            "adapter__dropout": 0.0,
            "optim__max_steps": steps,
            "optim__batch_size": 32,
            "optim__micro_batch_size": MICROBATCH,
            "optim__learning_rate": 1e-3,
            # Runs of another length then take the same steps.
            "optim__schedule": "constant",
            "optim__warmup_ratio": 0.0,
            "checkpoint__every_steps": 10,
            "storage": str(self.folder / "runs"),
        }
        return self.finray.recipe(**settings | changes)

    def run_of(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    chat_file: Path,
    fork_server: ForkServer,
) -> Iterator[Cluster]:
    network = Network(tmp_path_factory.mktemp("hosts"))
    token = network.folder / "token" / "auth_token"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        try:
            cluster = Cluster(network, tiny_model, chat_file)
            cluster.start()
            yield cluster
        finally:
            network.close()


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> Path:
    """The run in one process of the laptop, which every other one must equal but for rounding."""
    recipe = cluster.recipe("alone", COMPARED, optim__micro_batch_size=16)
    cluster.finray.run("train", recipe, "--local")
    return cluster.run_of("alone")


def assert_same_steps(run: Path, alone: Path) -> None:
    """Every step once, each with the loss of the same samples and weights, but for rounding.

    Another sample's loss is off by a tenth; rounding grows with the steps, as Adam divides by
    small numbers.
    """
    ours, theirs = losses(run), losses(alone)
    assert sorted(ours) == list(range(1, len(ours) + 1))
    differences = [abs(ours[step] - theirs[step]) for step in ours.keys() & theirs.keys()]
    assert max(differences) < 5e-2 and mean(differences) < 1e-2
    first, expected = ({line["step"]: line for line in metrics(one)} for one in (run, alone))
    for step in range(1, 6):
        for name in ("loss", "grad_norm"):
            assert first[step][name] == pytest.approx(expected[step][name], rel=1e-5), step


def test_two_hosts_send_each_other_the_gradients_and_little_else(cluster: Cluster) -> None:
    """2 (W - 1) / W of an adapter's bytes a step and worker, by the formula of all-reduce."""
    run = cluster.run_of("bytes")
    few = {"optim__batch_size": 2, "optim__micro_batch_size": 1, "checkpoint__every_steps": 240}
    recipe = cluster.recipe("bytes", 240, scale__workers=2, adapter__rank=2048, **few)
    cluster.job("submit", recipe)

    def sent(step: int) -> tuple[int, int]:
        wait_until(lambda: reached(run, step), f"step {step}")
        at = max(losses(run))
        return at, sum(node.sent() for node in cluster.nodes.values())

    (first, before), (last, after) = sent(20), sent(220)
    assert "bytes finished" in cluster.job("logs", "bytes", "--follow")
    workers, weight = 2, 4
    expected = 2 * (workers - 1) / workers * record(run)["parameters"]["trainable"] * weight
    assert (after - before) / (last - first) / workers == pytest.approx(expected, rel=0.02)


def test_a_host_is_killed_then_drained_then_cut_off(cluster: Cluster, alone: Path) -> None:
    """One run goes on through all of it, with the steps of a run that nothing happens to."""
    run = cluster.run_of("elastic")
    cluster.job("submit", cluster.recipe("elastic", STEPS, scale__workers=[1, 2]))
    wait_until(lambda: reached(run, 25), "step 25")
    _kill_and_grow_again(cluster, run)
    _drain_and_grow_again(cluster, run)
    _cut_off(cluster, run)
    wait_for_steps(run, 20)
    cluster.job("stop", "elastic")
    # Before anything is compared: the tests that follow need the host.
    cluster.join("beta")
    assert record(run)["status"] == "stopped", cluster.job("logs", "elastic")
    assert_same_steps(run, alone)


def wait_for_steps(run: Path, more: int) -> None:
    step = max(losses(run))
    wait_until(lambda: reached(run, step + more), f"{more} more steps")


def wait_for_attempt(run: Path, *sizes: int) -> None:
    """Until the run has had attempts of so many workers."""
    wait_until(lambda: record(run)["world_sizes"] == [*sizes], f"attempts of {sizes} workers")


def _kill_and_grow_again(cluster: Cluster, run: Path) -> None:
    """A killed host is done without until another comes."""
    cluster.nodes["beta"].kill()
    wait_for_attempt(run, 2, 1)
    cluster.nodes["beta"].boot()
    cluster.join("beta")
    wait_for_attempt(run, 2, 1, 2)
    first, second = record(run)["restarts"]
    assert first["step"] >= 20 and "failed" in first["reason"]
    assert "there is room for 2 workers, 1 train" in second["reason"]
    wait_for_steps(run, 15)


def _drain_and_grow_again(cluster: Cluster, run: Path) -> None:
    """A drained host is left with nothing lost."""
    cluster.drain("beta", 120)
    seen = 0

    def goes_on_without() -> bool:
        nonlocal seen
        if record(run)["world_sizes"] == [2, 1, 2]:
            seen = max(seen, *losses(run))
        return record(run)["world_sizes"] == [2, 1, 2, 1]

    wait_until(goes_on_without, "an attempt without it")
    restart = record(run)["restarts"][2]
    assert "are being removed" in restart["reason"] and restart["step"] >= seen
    wait_for_steps(run, 20)
    cluster.nodes["beta"].kill()
    cluster.nodes["beta"].boot()
    cluster.join("beta")
    wait_for_attempt(run, 2, 1, 2, 1, 2)
    wait_for_steps(run, 15)


def _cut_off(cluster: Cluster, run: Path) -> None:
    beta = cluster.nodes["beta"]
    # For a moment: nobody minds.
    beta.unplug()
    time.sleep(1.5)
    beta.plug()
    wait_for_steps(run, 20)
    assert record(run)["world_sizes"] == [2, 1, 2, 1, 2]
    # For long: it is done without, and Ray on it ends, as the cluster gave it up.
    beta.unplug()
    wait_for_attempt(run, 2, 1, 2, 1, 2, 1)
    beta.plug()
    wait_until(lambda: not beta.is_running("raylet"), "the end of Ray on the host")


def test_a_sweep_loses_a_host_and_no_trial(cluster: Cluster) -> None:
    """One trial on each node; the lost one waits for room, and resumes from its checkpoint."""
    base = cluster.recipe("base", 100, data__holdout=0.1)
    sweep = cluster.finray.folder / "sweep.yaml"
    search = {"optim.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    values = {"name": "swept", "recipe": base.name, "search": search, "trials": 2}
    values |= {"pruning": {"kind": "none"}, "storage": str(cluster.folder / "runs")}
    sweep.write_text(yaml.safe_dump(values), encoding="utf-8")
    trials = [cluster.run_of("swept") / "trials" / f"trial-{number:04d}" for number in range(2)]
    cluster.job("submit", sweep)
    wait_until(lambda: all(reached(trial, 15) for trial in trials), "step 15 of both trials")
    cluster.nodes["beta"].kill()
    output = cluster.job("logs", "swept", "--follow")
    assert "sweep swept finished" in output
    for trial in trials:
        assert record(trial)["status"] == "finished"
        assert sorted(losses(trial)) == list(range(1, 101))
    (restart,) = [one for trial in trials for one in record(trial).get("restarts", [])]
    assert restart["step"] >= 10
    cluster.nodes["beta"].boot()
    cluster.join("beta")


def test_two_hosts_train_as_one_process(cluster: Cluster, alone: Path) -> None:
    """Though their driver is killed, and the same recipe submitted again."""
    run = cluster.run_of("driver")
    recipe = cluster.recipe("driver", 80, scale__workers=2)
    cluster.job("submit", recipe)
    wait_until(lambda: reached(run, 25), "step 25")
    cluster.head.run("pkill", "-KILL", "-f", "finray.cluster.cli.job_entry")
    wait_until(lambda: '"FAILED"' in cluster.job("status", "driver", "--json"), "its failure")
    output = cluster.job("submit", recipe, "--wait")
    assert "submitted driver again, as driver~2" in output and "driver finished" in output
    assert record(run)["status"] == "finished"
    assert record(run)["world_sizes"] == [2, 2] and len(record(run)["nodes"]) == 2
    assert_same_steps(run, alone)


FUNCTION = '''
import os
import socket
import time

FOLDER = {folder!r}


def is_good(row):
    """Notes each call. Beta stops within its second part, and alpha begins no third one before."""
    host, stopped = socket.gethostname(), os.path.join(FOLDER, "stopped")
    with open(os.path.join(FOLDER, host), "a+") as calls:
        calls.write(f"{{row['n']}}\\n")
        calls.flush()
        calls.seek(0)
        count = len(calls.readlines())
    if host == "beta" and count == {stop} and not os.path.exists(stopped):
        open(stopped, "w").close()
        time.sleep(600)
    deadline = time.monotonic() + 300
    while host == "alpha" and count > {enough} and not os.path.exists(stopped):
        assert time.monotonic() < deadline, "beta has no work"
        time.sleep(0.05)
    return row["n"] % 7 != 3
'''
PARTS, ROWS = 6, 30


def _write_rows(folder: Path) -> None:
    """Rows with a column that makes them too large for the driver alone."""
    folder.mkdir()
    source = FUNCTION.format(folder=str(folder), stop=ROWS + 20, enough=2 * ROWS)
    (folder / "rows.py").write_text(source, encoding="utf-8")
    for part in range(PARTS):
        numbers = range(part * ROWS, (part + 1) * ROWS)
        # Each fourth text is nearly that of the first part, each tenth one is held out, too.
        texts = [
            " ".join(f"w{100 * (n % ROWS if n % 4 == 0 else n) + k}" for k in range(40)) + f" {n}"
            for n in numbers
        ]
        rows = [
            {"text": text, "n": n, "rest": "x" * 50_000}
            for n, text in zip(numbers, texts, strict=True)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"part-{part}.jsonl").write_text(lines, encoding="utf-8")
        with (folder / "held-out.jsonl").open("a", encoding="utf-8") as held_out:
            held_out.writelines(json.dumps({"text": text}) + "\n" for text in texts[1::10])


def _curated_recipe(cluster: Cluster, rows: Path, name: str) -> Path:
    data = {
        "train": str(rows / "part-*.jsonl"),
        "eval": str(rows / "held-out.jsonl"),
        "curate": [
            "normalise",
            {"kind": "filter", "min_tokens": 8},
            {"kind": "keep", "with": f"{rows}/rows.py:is_good"},
            {"kind": "deduplicate", "near": {"jaccard": 0.8}},
            "decontaminate",
        ],
        "max_length": 128,
    }
    storage = str(cluster.folder / name)
    return cluster.recipe(name, 1, data=data, method="pretrain", scale__workers=1, storage=storage)


def _content(storage: Path) -> dict[str, object]:
    """All that is prepared, but for when and by whom."""
    (file,) = (storage / "prepared").glob("*/manifest.json")
    manifest: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: value
        for name, value in manifest.items()
        if name not in ("attempt", "created_at", "seconds", "digest")
    }


def test_two_hosts_curate_as_one_process_and_one_is_lost(cluster: Cluster) -> None:
    """What the lost one had finished is not done again, and only the part that it was at is."""
    rows, address = cluster.folder / "rows", f"{cluster.head.address}:{PORT}"
    _write_rows(rows)
    cluster.finray.run("prepare", _curated_recipe(cluster, rows, "one-process"), "--local")
    recipe = _curated_recipe(cluster, rows, "two-hosts")
    preparing = cluster.admin.start("prepare", recipe, "--address", address)
    wait_until((rows / "stopped").exists, "a call that beta does not end")
    cluster.nodes["beta"].kill()
    assert preparing.wait() == 0, preparing.output()
    ours, theirs = (_content(cluster.folder / name) for name in ("two-hosts", "one-process"))
    assert ours == theirs
    calls = {host: list(map(int, (rows / host).read_text().split())) for host in cluster.nodes}
    lost = calls["beta"][ROWS:]
    assert len(lost) == 20 and len({n // ROWS for n in lost}) == 1
    expected = Counter([*range(PARTS * ROWS), *lost])
    assert Counter([*calls["alpha"], *calls["beta"]]) == expected
    cluster.nodes["beta"].boot()
    cluster.join("beta")
