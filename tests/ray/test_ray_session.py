"""What a Ray session that finray starts leaves on the machine: nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from finray.cluster.nodes.ray_session import ray_session
with ray_session(1, "local", {}, False):
    import ray
    print(ray.nodes()[0]["RayletSocketName"], flush=True)
    time.sleep(float(sys.argv[1]))
"""
NEXT = "from finray.training.common.scratch import remove_leftovers; remove_leftovers()"

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("is_killed", [False, True])
def test_nothing_is_left(is_killed: bool, tmp_path: Path) -> None:
    """Though the folder for temporary files has a path too long for sockets."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "300" if is_killed else "0"],
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert child.stdout is not None
    socket = Path(child.stdout.readline().decode().strip())
    folder = next(path for path in socket.parents if path.parent == Path("/tmp"))
    assert folder.name.startswith("finray-scratch-ray-")
    if is_killed:
        assert socket.exists()
        child.kill()
    child.communicate(timeout=120)
    assert child.returncode == (-signal.SIGKILL if is_killed else 0)
    if is_killed:
        subprocess.run([sys.executable, "-c", NEXT], env=environment, check=True)
    assert not folder.exists() and not list(tmp_path.iterdir())
