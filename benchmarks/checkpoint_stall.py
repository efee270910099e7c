"""The cost of a save every 10 steps: step time with saves against step time without.

Saves fall every 20 steps of one run; the 10 steps from a save on are compared with the 10 that
follow, so that a machine which slows down slows both. Training is finray's own worker, in process.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contenders import Job, Moment, run_finray
from measure import Figure, Target, conclude, parse_options, scratch, take_turns
from throughput import FULL, QUICK, make_job

EVERY = 10
"""Steps that share the cost of a save."""
PAIRS, QUICK_PAIRS = 10, 2
ADAPTER, WHOLE = "LoRA", "full fine-tuning"
Blocks = list[tuple[Moment, Moment, Moment]]
"""For each pair of blocks: start of the first, start of the second, end of the second."""
CLOCKS: dict[str, Callable[[Moment], float]] = {
    "step time": lambda moment: moment.wall,
    # In addition to wall time, because other processes hardly affect it. It includes the upload's
    # thread.
    "CPU time": lambda moment: moment.cpu,
}


def with_saves(job: Job, pairs: int, what: str) -> Job:
    """A run with a save every second block of steps."""
    recipe: dict[str, Any] = json.loads(json.dumps(job.recipe))
    recipe["optim"]["max_steps"] = (2 * pairs + 2) * EVERY
    recipe["checkpoint"] = {"every_steps": 2 * EVERY, "keep": 2}
    if what == WHOLE:
        recipe["adapter"] = None
    return replace(job, recipe=recipe)


def blocks(job: Job, pairs: int) -> Blocks:
    """The blocks of a run: the first of each pair begins with a save."""
    starts = run_finray(job).starts
    # A save follows step 2 * EVERY * n; the interval from that step's start holds it.
    firsts = [2 * EVERY * (number + 1) - 1 for number in range(pairs)]
    return [(starts[at], starts[at + EVERY], starts[at + 2 * EVERY]) for at in firsts]


def ratio(pairs: Blocks, clock: Callable[[Moment], float]) -> float:
    """Median ratio over a run's pairs, so that other load on the machine affects few of them."""
    return statistics.median(
        (clock(middle) - clock(first)) / (clock(last) - clock(middle))
        for first, middle, last in pairs
    )


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__)
    sizes, pairs = (QUICK, QUICK_PAIRS) if options.quick else (FULL, PAIRS)
    torch.set_num_threads(options.threads)
    with scratch() as folder:
        job = make_job(folder, sizes, "all", options.threads)
        jobs = {what: with_saves(job, pairs, what) for what in (ADAPTER, WHOLE)}
        runs = take_turns(
            {what: partial(blocks, jobs[what], pairs) for what in jobs}, options.repetitions
        )
    figures, seconds = [], {}
    for what, turns in runs.items():
        for name, clock in CLOCKS.items():
            values = tuple(ratio(turn, clock) for turn in turns)
            target = Target("at most", 1.02) if (what, name) == (ADAPTER, "step time") else None
            title = f"{name} saving every {EVERY} steps / not, {what}"
            figures.append(Figure(title, values, target))
        seconds[f"{what}, seconds of {EVERY} steps without a save"] = [
            statistics.median(last.wall - middle.wall for _, middle, last in turn) for turn in turns
        ]
    conclude("checkpoint_stall", options, figures, seconds, {**sizes, "pairs": pairs})


if __name__ == "__main__":
    main()
