"""$FINRAY_ADDRESS: a URL for the Jobs API, a Ray address for a driver here; --address wins."""

import re
import socket
from pathlib import Path

import pytest

from finray.cluster.cli import job_entry
from finray.cluster.cli.main import main
from finray.cluster.cli.usage import parse
from finray.cluster.jobs import staging
from finray.cluster.nodes.address import (
    DASHBOARD,
    VARIABLE,
    dashboard_address,
    require_answer,
)
from finray.cluster.nodes.ray_session import cluster_address, ray_session
from finray.training.common.errors import InputError

CLUSTERS = ["head:6379", "auto", "local", "ray://head:10001"]


@pytest.fixture(autouse=True)
def of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "of-ray:6379")
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("named", ["http://head:8265", "HTTPS://head"])
def test_a_url_is_for_jobs(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dashboard_address(None) == DASHBOARD
    monkeypatch.setenv(VARIABLE, named)
    assert dashboard_address(None) == named
    assert dashboard_address("http://other") == "http://other"
    assert cluster_address(None) == "of-ray:6379"
    assert cluster_address("auto") == "auto"


@pytest.mark.parametrize("named", CLUSTERS)
def test_a_ray_address_is_for_drivers(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_address(None) == "of-ray:6379"
    monkeypatch.setenv(VARIABLE, named)
    assert cluster_address(None) == named
    assert cluster_address("other:6379") == "other:6379"
    with pytest.raises(InputError, match=f"^FINRAY_ADDRESS={named} .*http://head:8265"):
        dashboard_address(None)
    assert dashboard_address("http://other") == "http://other"


@pytest.mark.parametrize(
    "command", ["job list", "job logs run", "job submit absent.yaml", "cluster doctor"]
)
def test_commands_of_jobs_refuse_a_ray_address(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "head:6379")
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("finray: FINRAY_ADDRESS=head:6379") and err.count("\n") == 1


def test_a_url_given_to_a_driver_is_refused() -> None:
    with pytest.raises(InputError, match=r"--address http://head:8265.*finray job"):
        cluster_address("http://head:8265")


def test_inside_a_job_the_jobs_cluster_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the head's environment says."""
    commands: list[list[str]] = []
    monkeypatch.setattr("finray.cluster.cli.main.main", commands.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / staging.RECIPE_FILE).write_text("storage: runs\nname: r\n", encoding="utf-8")
    for named in (*CLUSTERS, "http://head:8265"):
        monkeypatch.setenv(VARIABLE, named)
        job_entry.main(["train", "--wait-for-nodes", "0", "--log-level", "debug"])
        options = parse(commands[-1])
        assert cluster_address(options.address) == "auto" and options.log_level == "debug"


def test_an_address_at_which_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        require_answer(f"127.0.0.1:{port}")
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"[::1]:{port}", "h:99999"):
        with pytest.raises(InputError, match=f"^no Ray cluster answers at {re.escape(address)}: "):
            require_answer(address)
    with pytest.raises(InputError, match="no Ray cluster answers"):
        ray_session(1, f"127.0.0.1:{port}", {}, False).__enter__()
    require_answer("auto")
