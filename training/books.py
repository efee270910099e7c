"""What rank 0 writes into the run's folder while the run goes on."""

import math
import time
from collections.abc import Callable
from typing import Any

from .checkpoint import Choice
from .metrics_log import MetricsLog
from .recipe import Recipe
from .run_folder import (
    Record,
    read_rollouts,
    read_run,
    read_samples,
    write_rollouts,
    write_run,
    write_samples,
)
from .storage import Folder

_HEARTBEAT_SECONDS = 20.0
_ROLLOUTS_KEPT = 400


class Books:
    """metrics.jsonl, samples.jsonl, rollouts.jsonl and run.json of one run.

    Args:
        folder: the run's folder.
        recipe: what is run.
        step: where this attempt starts.
    """

    def __init__(self, folder: Folder, recipe: Recipe, step: int) -> None:
        self._folder = folder
        self._metrics = MetricsLog(folder, step, "tensorboard" in recipe.log.to)
        self._latest: dict[str, float] = {}
        self._noted_at = time.monotonic()
        # Those of later steps belong to a part of the run that a crash undid.
        self._rollouts = [line for line in read_rollouts(folder) if line["step"] <= step]

    def open(
        self, choice: Choice, world_size: int, facts: dict[str, Any], cause: str | None
    ) -> None:
        """Note who trains, where this attempt starts, and what ended the one before."""

        def change(record: Record) -> None:
            record.update(facts)
            record["world_sizes"] = [*record.get("world_sizes", []), world_size]
            if choice.name is not None or choice.passed_over or cause:
                start = f"resumed from {choice.name}" if choice.name else "started anew"
                reason = "; ".join((*([cause] if cause else []), start, *choice.passed_over))
                restarts = record.get("restarts", [])
                record["restarts"] = [*restarts, {"step": choice.step, "reason": reason}]

        update_run(self._folder, change)

    def logged(self, line: dict[str, float]) -> None:
        """Add a line to metrics.jsonl; the loss and what tells how good the model is are
        remembered for run.json."""
        self._metrics.add(line)
        told = {name for name in line if name.startswith("eval_")} | {"loss", "exact_match"}
        self._latest.update({name: line[name] for name in line if name in told})
        if time.monotonic() - self._noted_at > _HEARTBEAT_SECONDS:
            self.note_progress(int(line["step"]), None)

    def sampled(self, step: int, examples: list[Record]) -> None:
        """Remember completions of a step; rollouts.jsonl holds the last of them."""
        self._rollouts += [{"step": step, **example} for example in examples]
        del self._rollouts[:-_ROLLOUTS_KEPT]

    def note_progress(self, step: int, tokens: int | None) -> None:
        """Write all that is known so far."""
        self._metrics.flush()
        if self._rollouts:
            write_rollouts(self._folder, self._rollouts)
        self._noted_at = time.monotonic()

        def change(record: Record) -> None:
            record["step"] = step
            if tokens is not None:
                record["tokens"] = tokens
            record["metrics"] = {**record.get("metrics", {}), **self._latest}

        update_run(self._folder, change)

    def measured_base(self, measures: dict[str, float]) -> None:
        """Note what the model could do before the first step."""
        self._metrics.add({"step": 0, "epoch": 0.0, **measures})
        update_run(self._folder, lambda record: record.update(before=measures))

    def answered(self, samples: list[Record], answers: list[str], when: str) -> None:
        """Write the answers given `before` or `after` beside those that are there."""
        known = {record["row"]: record for record in read_samples(self._folder)}
        blank: Record = {"before": None, "after": None}
        write_samples(
            self._folder,
            [
                {**blank, **known.get(sample["row"], {}), **sample, when: text}
                for sample, text in zip(samples, answers, strict=True)
            ],
        )

    def finished(self, result: str) -> None:
        """Note that the result lies in the run's folder, under this name."""
        update_run(self._folder, lambda record: record.update(result=result))


def update_run(folder: Folder, change: Callable[[Record], None]) -> None:
    """Read run.json, change it, write it whole. One process at a time does this: the driver
    before and after the workers, rank 0 while they train."""
    record = read_run(folder) or {}
    change(record)
    record["updated_at"] = now()
    write_run(folder, record)


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def as_number(value: Any) -> float:
    """A tensor's or a number's value; NaN for None."""
    return math.nan if value is None else float(value)
