"""Hosts of their own on one machine: namespaces of network, processes, mounts and name (root).

A host has an address on a network that the test made, a name which its /etc/hosts maps to
loopback (as Debian does), and processes that end together when it is killed.
"""

import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

PREFIX = "10.77.7"


def why_not() -> str | None:
    """Why no host can be made here; None where they can."""
    if os.geteuid() != 0:
        return "hosts are namespaces, and only root makes them"
    name = f"finray-{uuid.uuid4().hex[:6]}"
    try:
        _run("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here: {error}"
    try:
        _run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        _run("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"bridges or namespaces cannot be made here: {error}"
    finally:
        _run("ip", "netns", "del", name)
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


class Network:
    """A switch in a namespace of its own, and the hosts that are plugged into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = uuid.uuid4().hex[:5]
        self.switch = f"fr{self.id}-switch"
        self.hosts: list[Host] = []
        _run("ip", "netns", "add", self.switch)
        _run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "br0", "up")

    def host(self, name: str) -> "Host":
        """Another host, running but for its programs."""
        host = Host(self, name, len(self.hosts) + 1)
        self.hosts.append(host)
        return host

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
            _run("ip", "netns", "del", host.namespace)
        _run("ip", "netns", "del", self.switch)


class Host:
    """One machine of the network."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.namespace = f"fr{network.id}-{name}"
        self.address = f"{PREFIX}.{number}"
        self._switch = network.switch
        self._port = f"v{network.id}{number}"
        self._folder = network.folder / name
        self._init: subprocess.Popen[bytes] | None = None
        self._plug_in()
        self.boot()

    def _plug_in(self) -> None:
        _run("ip", "netns", "add", self.namespace)
        pair = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _run("ip", "-n", self._switch, "link", "add", self._port, *pair)
        _run("ip", "-n", self._switch, "link", "set", self._port, "master", "br0", "up")
        inside = ("ip", "-n", self.namespace)
        _run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "link", "set", "eth0", "up")
        # Where nothing answers: programs learn their own address from the route.
        _run(*inside, "route", "add", "default", "via", f"{PREFIX}.254")

    def boot(self) -> None:
        """Start the host's first process; it has a /tmp, a name and an /etc/hosts of its own."""
        temporary = self._folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        names = self._folder / "hosts"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n", encoding="utf-8")
        # A shell reaps what is left to it.
        script = (
            f"hostname {self.name} && mount --bind {temporary} /tmp/ray && "
            f"mount --bind {names} /etc/hosts && echo up; while sleep 2; do :; done"
        )
        Path("/tmp/ray").mkdir(exist_ok=True)
        spaces = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", *spaces, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == b"up\n", f"host {self.name} does not start"

    def command(self, *command: str | Path, folder: Path = Path("/")) -> list[str]:
        """What runs a command on this host, in a folder."""
        assert self._init is not None
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text()
        spaces = ("--net", "--uts", "--mount", "--pid", f"--wdns={folder}")
        return ["nsenter", "--target", children.split()[0], *spaces, "--", *map(str, command)]

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None, seconds: float = 120
    ) -> str:
        """Run to the end, which is a good one; returns what was printed."""
        done = subprocess.run(
            self.command(*command),
            env={**os.environ, **(env or {})},
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{command} on {self.name}: {done.stdout}"
        return done.stdout

    def ray(self, *arguments: str, env: dict[str, str]) -> str:
        """Ray's own command on this host."""
        return self.run(sys.executable, "-m", "ray.scripts.scripts", *arguments, env=env)

    def is_running(self, name: str) -> bool:
        """Whether a program of this name runs on the host."""
        command = self.command("pgrep", "-x", name)
        return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0

    def sent(self) -> int:
        """Bytes that the host has put on the network so far."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self.namespace, "cat", path))

    def unplug(self) -> None:
        """Cut the host off: its programs run on, and nothing reaches it."""
        _run("ip", "-n", self._switch, "link", "set", self._port, "down")

    def plug(self) -> None:
        """The end of `unplug`."""
        _run("ip", "-n", self._switch, "link", "set", self._port, "up")

    def kill(self) -> None:
        """As by a power cut: all its processes end at once."""
        if self._init is None:
            return
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")
        for pid in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._init.wait(30)
        assert self._init.stdout is not None
        self._init.stdout.close()
        self._init = None
