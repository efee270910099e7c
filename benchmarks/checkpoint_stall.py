"""What a save every 10 steps costs the training: step time with saves against without.

Saves fall every 20 steps of one run; the 10 steps from a save on are compared with the 10 that
follow, so that a machine which slows down slows both. Training is finray's own worker, in process.
"""

import json
import statistics
from dataclasses import replace
from typing import Any

import torch
from contenders import Job, run_finray
from measure import Asked, Figure, conclude, parse_options, scratch, take_turns
from throughput import FULL, QUICK, make_job

EVERY = 10
"""Steps that share the cost of a save."""
PAIRS, QUICK_PAIRS = 10, 2
ADAPTER, WHOLE = "LoRA", "full fine-tuning"


def with_saves(job: Job, pairs: int, what: str) -> Job:
    """A run with a save every second block of steps."""
    recipe: dict[str, Any] = json.loads(json.dumps(job.recipe))
    recipe["optim"]["max_steps"] = (2 * pairs + 2) * EVERY
    recipe["checkpoint"] = {"every_steps": 2 * EVERY, "keep": 2}
    if what == WHOLE:
        recipe["adapter"] = None
    return replace(job, recipe=recipe)


def seconds_of_blocks(job: Job, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each block of steps that begins with a save, and of each that follows it."""
    starts = [moment.wall for moment in run_finray(job).starts]
    # A save follows step 2 * EVERY * n; the interval from that step's start holds it.
    firsts = [2 * EVERY * (number + 1) - 1 for number in range(pairs)]
    blocks = [[starts[first + n * EVERY] for n in range(3)] for first in firsts]
    return [b - a for a, b, _ in blocks], [c - b for _, b, c in blocks]


def main() -> None:
    """Measure and write."""
    options, _ = parse_options(__doc__, repetitions=3)
    sizes, pairs = (QUICK, QUICK_PAIRS) if options.quick else (FULL, PAIRS)
    torch.set_num_threads(options.threads)
    with scratch() as folder:
        job = make_job(folder, sizes, "all", options.threads)
        turns = take_turns(
            {
                what: lambda what=what: seconds_of_blocks(with_saves(job, pairs, what), pairs)
                for what in (ADAPTER, WHOLE)
            },
            options.repetitions,
        )
    figures, told = [], {}
    for what, runs in turns.items():
        # The median over a run's pairs: what else the machine did falls on one of them.
        values = tuple(
            statistics.median(a / b for a, b in zip(saving, free, strict=True))
            for saving, free in runs
        )
        asked = Asked("at most", 1.02) if what == ADAPTER else None
        figures.append(Figure(f"step time saving every {EVERY} steps / not, {what}", values, asked))
        told[f"{what}, seconds of {EVERY} steps with a save"] = [
            statistics.median(saving) for saving, _ in runs
        ]
        told[f"{what}, seconds of {EVERY} steps without"] = [
            statistics.median(free) for _, free in runs
        ]
    conclude("checkpoint_stall", options, figures, told, {**sizes, "pairs": pairs})


if __name__ == "__main__":
    main()
