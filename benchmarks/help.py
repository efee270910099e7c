"""CPU time of `finray --help` and of `import finray`, compared with a Python that does nothing.

It is user plus system time of the child process, which other processes hardly affect.
"""

import os
import subprocess
import sys
import time
from functools import partial

from measure import Figure, Target, conclude, finray_command, parse_options, take_turns


def cpu_seconds(command: list[str]) -> dict[str, float]:
    """CPU and wall time of a command, in seconds."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{command} ended with {child.returncode}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - started}


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__, repetitions=15)
    commands = {
        "finray --help": [*finray_command(), "--help"],
        "import finray": [sys.executable, "-c", "import finray"],
        "python": [sys.executable, "-c", ""],
    }
    contenders = {name: partial(cpu_seconds, command) for name, command in commands.items()}
    take_turns(contenders, 1)  # fills the page cache and compiles modules
    turns = take_turns(contenders, options.repetitions)
    seconds = {
        f"{name}, {clock} seconds": [result[clock] for result in measured]
        for name, measured in turns.items()
        for clock in ("cpu", "wall")
    }
    figures = [
        Figure(
            f"CPU time of {name}",
            tuple(seconds[f"{name}, cpu seconds"]),
            Target("at most", most, " s"),
            " s",
        )
        for name, most in (("finray --help", 0.25), ("import finray", 0.1))
    ]
    conclude("help", options, figures, seconds, {})


if __name__ == "__main__":
    main()
