"""The start of Ray on this machine, which may be busy with other things."""

from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...training.common.errors import RunError
from ...training.common.formatting import one_line

START_VARIABLES = {
    # Seconds that Ray waits for the processes that it starts; 30 by default.
    "RAY_raylet_start_wait_time_s": "60",
    "RAY_gcs_server_port_wait_time_s": "60",
}
"""Environment of a process that starts Ray, set before Ray is imported."""
_ATTEMPTS = 2
_END_SECONDS = 30.0


def start_ray(**options: Any) -> None:
    """Start a cluster on this machine with `ray.init`, if need be in a second attempt.

    On a busy machine Ray's raylet ends when its agents take longer than 15 seconds to load Python,
    which no setting changes. The next attempt reads their files from memory.

    Args:
        options: of `ray.init`.

    Raises:
        RunError: no attempt succeeded; nothing that they started still runs.
    """
    import ray

    for _ in range(_ATTEMPTS):
        before = _processes_of_ray()
        try:
            ray.init(**options)
            return
        except BaseException as error:
            ray.shutdown()  # does not know what an unfinished start has left
            _end(_processes_of_ray() - before)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            cause = one_line(str(error)).rstrip(". ") or type(error).__name__
    raise RunError(
        f"Ray did not start on this machine in {_ATTEMPTS} attempts: {cause}; the machine may be "
        "too busy or short of memory: end other programs and try again, or name a running cluster "
        "with --address"
    )


def _processes_of_ray() -> Set[Any]:
    """This process's children that run a program of Ray's."""
    import ray

    # Ray brings psutil along, and has made it importable.
    import psutil  # isort: skip

    programs, processes = str(Path(ray.__file__).parent), set()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if any(word.startswith(programs) for word in child.cmdline()):
                processes.add(child)
    return processes


def _end(processes: Set[Any]) -> None:
    """Kill processes, and wait for their end; the agents of a raylet end with it."""
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_END_SECONDS)
