"""The overhead of a sweep over its training: 16 short trials, two at a time, on two cores. And how
often 50 trials prepare their data.

The command is timed whole, with the start of Ray and of the slots. It is compared with the seconds
in which the trials themselves ran (loading, steps, evaluation, result; read from their records),
divided by the concurrency; and with the seconds of their optimizer steps alone.
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from measure import (
    Figure,
    Target,
    child_environment,
    conclude,
    finray_command,
    parse_options,
    ratios,
    scratch,
)
from tune_table import QUICKSTART

TRIALS, CONCURRENCY = 16, 2
STEPS, QUICK_STEPS = 24, 4
MANY_TRIALS, QUICK_MANY_TRIALS = 50, 4


def run_sweep(folder: Path, trials: int, steps: int, threads: int) -> tuple[float, list[Any]]:
    """Run a sweep. Returns the seconds of the command and the trials' measures."""
    sweep: dict[str, Any] = {
        "name": "overhead",
        "recipe": str(QUICKSTART),
        "set": {
            "scale.workers": 1,
            "optim.epochs": None,
            "optim.max_steps": steps,
            "optim.batch_size": 4,
            "eval.samples": 0,
            "eval.every_steps": None,
            "log.to": [],
        },
        "search": {"optim.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "trials": trials,
        "concurrency": CONCURRENCY,
        "pruning": {"kind": "none"},
        "sampler": "random",
        "storage": str(folder / "runs"),
    }
    (folder / "sweep.yaml").write_text(json.dumps(sweep), encoding="utf-8")
    command = [*finray_command(), "tune", "sweep.yaml"]
    environment = {**child_environment(), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    wall = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"finray tune failed:\n{done.stderr[-4000:]}")
    record = json.loads((folder / "runs/overhead/sweep.json").read_text(encoding="utf-8"))
    measures = [row["measures"] for row in record["trials"]]
    assert len(measures) == trials
    return wall, measures


def prepared_sets(folder: Path) -> int:
    """Number of prepared data sets in a sweep's storage."""
    return len(list((folder / "runs/prepared").glob("*/manifest.json")))


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__)
    walls, trials, steps = [], [], []
    for _ in range(options.repetitions):
        with scratch() as folder:
            wall, measures = run_sweep(folder, TRIALS, QUICK_STEPS if options.quick else STEPS, 1)
        walls.append(wall)
        trials.append(sum(trial["wall_seconds"] for trial in measures) / CONCURRENCY)
        steps.append(sum(trial["seconds"] for trial in measures) / CONCURRENCY)
    many = QUICK_MANY_TRIALS if options.quick else MANY_TRIALS
    with scratch() as folder:
        run_sweep(folder, many, 1, 1)
        prepared = prepared_sets(folder)
    figures = [
        Figure(
            "a sweep of 16 trials / the trials' own time divided by the concurrency",
            ratios(walls, trials),
            Target("at most", 1.25),
        ),
        Figure(
            "a sweep of 16 trials / their optimizer steps' time divided by the concurrency",
            ratios(walls, steps),
        ),
        Figure(
            f"prepared data sets of a sweep of {many} trials", (prepared,), Target("at most", 1)
        ),
    ]
    seconds = {"sweep, seconds": walls, "trials / 2, seconds": trials, "steps / 2, seconds": steps}
    conclude("tune_overhead", options, figures, seconds, {"trials": TRIALS, "steps": STEPS})


if __name__ == "__main__":
    main()
