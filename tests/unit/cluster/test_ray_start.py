"""The start of Ray on a busy machine; a stand-in for Ray fails as the real one does there."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finray.cluster.nodes.ray_session import ray_session
from finray.cluster.nodes.ray_start import START_VARIABLES, start_ray
from finray.training.common.errors import RunError

TIMED_OUT = (
    "The current node timed out during startup. This could happen because some of the raylet "
    "failed to startup or the GCS has become overloaded."
)


class SlowRay(ModuleType):
    """A module `ray` of which each start leaves a process, and the first ones fail."""

    def __init__(self, folder: Path, errors: list[BaseException]) -> None:
        super().__init__("ray")
        self.__file__ = str(folder / "__init__.py")
        self._program = folder / "gcs_server.py"
        self._program.write_text("import time\nprint(flush=True)\ntime.sleep(600)\n")
        self._errors = errors
        self.started: list[subprocess.Popen[bytes]] = []
        self.options: list[dict[str, Any]] = []
        self.is_connected = False

    def init(self, **options: Any) -> None:
        self.options.append(options)
        command = [sys.executable, str(self._program)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        if self._errors:
            raise self._errors.pop(0)
        self.is_connected = True

    def is_initialized(self) -> bool:
        return self.is_connected

    def shutdown(self) -> None:
        self.is_connected = False

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


@pytest.fixture
def slow_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SlowRay]]:
    made: list[SlowRay] = []

    def make(*errors: BaseException) -> SlowRay:
        made.append(SlowRay(tmp_path, list(errors)))
        monkeypatch.setitem(sys.modules, "ray", made[-1])
        return made[-1]

    yield make
    for ray in made:
        ray.close()


def are_running(ray: SlowRay) -> list[bool]:
    return [process.poll() is None for process in ray.started]


def test_a_second_attempt(
    slow_ray: Callable[..., SlowRay], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It finds nothing of the first one, and other child processes live on."""
    for name in START_VARIABLES:
        monkeypatch.setenv(name, "")  # set back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    ray = slow_ray(Exception(TIMED_OUT))
    with subprocess.Popen(["sleep", "600"]) as other:
        with ray_session(3, "local", {}, verbose=False):
            assert are_running(ray) == [False, True]
            assert ray.options[0] == ray.options[1] and ray.options[1]["num_cpus"] >= 3
        assert other.poll() is None
        other.kill()


def test_two_failures_are_one_line(slow_ray: Callable[..., SlowRay]) -> None:
    ray = slow_ray(Exception(TIMED_OUT), RuntimeError("no port\nof the GCS"))
    with pytest.raises(RunError) as caught:
        start_ray(address="local")
    message = str(caught.value)
    assert message.startswith(
        "Ray did not start on this machine in 2 attempts: no port of the GCS;"
    )
    assert "end other programs" in message and "--address" in message and "\n" not in message
    assert are_running(ray) == [False, False]


def test_ctrl_c_ends_the_start(slow_ray: Callable[..., SlowRay]) -> None:
    ray = slow_ray(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        start_ray(address="local")
    assert are_running(ray) == [False]
