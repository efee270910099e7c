"""A Ray head on this machine: started with a token, stopped by its process id."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ...training.common.errors import InputError, RunError
from .ray_start import START_VARIABLES
from .token import MODE, ensure_token, probe, token_file

DRAIN_SECONDS = 570
"""How long a node lets its work end on SIGTERM: long enough to save a checkpoint, and less than the
grace period of a pod. By default Ray waits for 30 s."""
_OF_WORKERS = {
    "RAY_worker_niceness": "0",
    # What Ray starts for the first job, a process for each CPU, lacks a job's environment.
    "RAY_prestart_worker_first_driver": "0",
}
_VARIABLES = {
    MODE: "token",
    "RAY_worker_niceness": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
}
"""Environment of `ray start` on the other nodes."""
_START_SECONDS = 180.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Head:
    """A head that runs on this machine."""

    pid: int
    """Process id of `ray start --block`, which stops its node when it is stopped."""
    address: str
    """host:port that other nodes join."""
    dashboard: str


def start_head(port: int, dashboard_port: int, options: tuple[str, ...] = ()) -> Head:
    """Start a head with its dashboard on localhost and a token.

    Raises:
        InputError: a head already runs here, or a port is taken.
        RunError: Ray did not start.
    """
    running = current_head()
    if running is not None:
        raise InputError(f"a head already runs here: {running.address} (finray cluster down)")
    for taken in (port, dashboard_port):
        _check_free(taken)
    token = ensure_token()
    log = token.parent / "finray-head.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += [f"--dashboard-port={dashboard_port}", *options]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # The head drains no longer than Ray's default: `cluster down` stops what runs on it.
            env={**START_VARIABLES, **os.environ, MODE: "token", **_OF_WORKERS},
        )
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    _wait_for(process, dashboard, log)
    head = Head(process.pid, f"{_own_address()}:{port}", dashboard)
    _note().write_text(json.dumps(asdict(head)), encoding="utf-8")
    return head


def current_head() -> Head | None:
    """The running head that `start_head` started; None if there is none."""
    try:
        head = Head(**json.loads(_note().read_text(encoding="utf-8")))
        arguments = Path(f"/proc/{head.pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return head if b"--head" in arguments else None


def stop_head() -> Head | None:
    """Stop the head that `start_head` started, with its node.

    Returns:
        The head; None if there was none.

    Raises:
        RunError: it did not stop.
    """
    head = current_head()
    if head is None:
        return None
    os.kill(head.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while _is_alive(head.pid):
        if time.monotonic() > deadline:
            raise RunError(
                f"the head (process {head.pid}) did not stop within {_STOP_SECONDS:g} s; end it "
                f"with kill -9 {head.pid}, and call finray cluster down again"
            )
        time.sleep(0.1)
    _note().unlink(missing_ok=True)
    return head


def joining_lines(head: Head) -> str:
    """Shell commands that make another machine a node of the head's cluster.

    With --block, because only that process lets the node's work end when it is stopped.
    """
    variables = " ".join(f"{name}={value}" for name, value in _VARIABLES.items())
    return (
        f"scp {socket.gethostname()}:{token_file()} .ray/auth_token && chmod 600 .ray/auth_token"
        f" && {variables} ray start --block --disable-usage-stats --address={head.address}"
    )


def _note() -> Path:
    return token_file().parent / "finray-head.json"


def _check_free(port: int) -> None:
    with closing(socket.socket()) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            raise InputError(
                f"port {port} is taken; another Ray may run here. Choose others with --port and "
                "--dashboard-port"
            ) from None


def _wait_for(process: subprocess.Popen[bytes], dashboard: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            access = probe(dashboard)
            break
        except InputError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = " / ".join(lines[-3:])
                raise RunError(
                    f"Ray did not start: {last}; see {log}, or give another --port"
                ) from None
            time.sleep(0.2)
    if access == "open":
        process.terminate()
        raise RunError(f"{dashboard} answers without a token; the head was stopped")


def _own_address() -> str:
    """This machine's address in its network; no packet is sent."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        try:
            client.connect(("192.0.2.1", 9))
        except OSError:  # no network at all
            return "127.0.0.1"
        return str(client.getsockname()[0])


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
