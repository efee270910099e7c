"""Seconds from the command to the first optimizer step on two workers of this machine.

`finray train` with nothing prepared (and once more with the data prepared) against a script that
starts Ray, a TorchTrainer of two workers and TRL's SFTTrainer in them, on the same rows. On its own
machine finray needs no Ray; a third contender is `finray train --address local`, whose workers are
Ray Train's all the same. A second script shows how much of that is Ray Train and the loading of
libraries alone: it trains nothing. Each contender is ended once it got there.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from measure import (
    HERE,
    Figure,
    Target,
    conclude,
    finray_command,
    parse_options,
    ratios,
    scratch,
    take_turns,
)
from start import FULL, LONGEST_WAIT, POLL_SECONDS, QUICK, has_exited, make_inputs, start

SCRIPT = ("ray_trl_finetune.py", "model", "rows.jsonl")


def seconds_until(reached: Callable[[], bool], command: list[str], folder: Path) -> float:
    """Seconds from a command's start until `reached()`; then all its processes are killed."""
    started = time.perf_counter()
    child = start(command, folder, threads=1)
    while not (there := reached()) and not has_exited(child):
        if time.perf_counter() - started > LONGEST_WAIT:
            break
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    _kill_all(child)
    if not there:
        raise RuntimeError(f"{command[0]} made no step within {seconds:.0f} s")
    return seconds


def _kill_all(child: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)
    child.wait(30)
    assert child.stdout is not None
    child.stdout.close()


def finray_seconds(folder: Path, name: str, fresh: bool, *place: str) -> float:
    """Run `finray train` until metrics.jsonl has its first line."""
    storage = folder / "runs"
    shutil.rmtree(storage if fresh else storage / name, ignore_errors=True)
    metrics = storage / name / "metrics.jsonl"
    settings = (f"storage={storage}", f"name={name}", "scale.workers=2")
    command = [*finray_command(), "train", "recipe.yaml", *place]
    command += [word for setting in settings for word in ("--set", setting)]
    return seconds_until(lambda: metrics.exists() and metrics.stat().st_size > 0, command, folder)


def script_seconds(folder: Path, script: str, *arguments: str) -> float:
    """Run a script until it creates the file that marks its first step."""
    marker = folder / "first-step"
    marker.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / script), *arguments, "output", str(marker)]
    return seconds_until(marker.exists, command, folder)


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__)
    sizes = QUICK if options.quick else FULL
    with scratch() as folder:
        make_inputs(folder, sizes)
        contenders = {
            "finray": partial(finray_seconds, folder, "cold", True),
            "finray, data prepared": partial(finray_seconds, folder, "warm", False),
            "finray on Ray": partial(finray_seconds, folder, "ray", True, "--address", "local"),
            "script": partial(script_seconds, folder, *SCRIPT),
            "libraries alone": partial(script_seconds, folder, "ray_least.py"),
        }
        seconds = take_turns(contenders, options.repetitions)
    figures = [
        Figure(
            "time to the first step, finray with 2 workers / TorchTrainer and TRL",
            ratios(seconds["finray"], seconds["script"]),
            Target("at most", 0.5),
        ),
        Figure(
            "time to the first step, finray with 2 workers and data prepared / the same",
            ratios(seconds["finray, data prepared"], seconds["script"]),
        ),
        Figure(
            "time to the first step, finray on two Ray Train workers / the same",
            ratios(seconds["finray on Ray"], seconds["script"]),
        ),
        Figure(
            "the same of a TorchTrainer whose workers load the libraries and do nothing / the same",
            ratios(seconds["libraries alone"], seconds["script"]),
        ),
    ]
    conclude("start_ray", options, figures, seconds, dict(sizes))


if __name__ == "__main__":
    main()
