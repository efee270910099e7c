"""What rank 0 writes into the run's folder while it trains."""

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ..common.errors import RunError
from ..common.secrets import redact
from ..common.storage import Folder
from ..common.uploader import Uploader
from ..config.recipe import Recipe
from ..data.origin import Origins
from .checkpoint import Choice
from .metrics_log import MetricsLog
from .run_folder import (
    STACKS_FOLDER,
    Record,
    read_rollouts,
    read_run,
    read_samples,
    write_rollouts,
    write_run,
    write_samples,
)

_HEARTBEAT_SECONDS = 20.0
_REMOTE_SECONDS = 10.0
_ROLLOUTS_KEPT = 400
_SKIPPED_KEPT = 100


class RunRecorder:
    """metrics.jsonl, samples.jsonl, rollouts.jsonl and run.json of one run.

    A slow or absent store does not stop the training: a later write contains what it lacks. The
    end of the context writes the rest, and raises a RunError if the store does not accept it.

    Args:
        folder: the run's folder.
        recipe: the run's.
        step: the step that this attempt starts from.
    """

    def __init__(self, folder: Folder, recipe: Recipe, step: int) -> None:
        self._folder = folder
        self._metrics = MetricsLog(folder, step, "tensorboard" in recipe.log.to)
        self._record = read_run(folder) or {}
        self._uploads = Uploader()
        self._lock = threading.Lock()
        self._is_behind = False
        """True if the folder lacks something that is due."""
        self._seconds = _HEARTBEAT_SECONDS if folder.local is not None else _REMOTE_SECONDS
        self._noted_at = time.monotonic()
        # A crash undid the later steps.
        self._rollouts = [line for line in read_rollouts(folder) if line["step"] <= step]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._uploads.do(self._write_all, self._folder)
        except RunError:
            if error is None:  # otherwise the first error says more
                raise

    def start(
        self, choice: Choice, world_size: int, facts: dict[str, Any], cause: str | None
    ) -> None:
        """Record the start of an attempt.

        Args:
            choice: the checkpoint that it resumes from.
            world_size: number of workers.
            facts: further keys of run.json.
            cause: why the attempt before ended, if there was one.
        """
        self._change(**facts, world_sizes=[*self._record.get("world_sizes", []), world_size])
        if "skipped" in self._record:  # later steps are undone
            skipped = [step for step in self._record["skipped"] if step["step"] <= choice.step]
            self._change(skipped=skipped)
        restarts = self._record.get("restarts", [])
        hangs = self._new_hangs(restarts)
        if choice.name is not None or choice.skipped or cause or hangs:
            start = f"resumed from {choice.name}" if choice.name else "restarted from the beginning"
            before = [cause] if cause else []
            reason = redact("; ".join((*before, start, *choice.skipped, *hangs)))
            self._change(restarts=[*restarts, {"step": choice.step, "reason": reason}])
        write_run(self._folder, self._record)

    def _new_hangs(self, restarts: list[Record]) -> list[str]:
        """Workers that hung since the last start: they leave only their stacks."""
        reported = " ".join(restart["reason"] for restart in restarts)
        names = (self._folder / STACKS_FOLDER).names()
        return [f"a step hung: {STACKS_FOLDER}/{name}" for name in names if name not in reported]

    def add_skipped(self, steps: list[tuple[int, Origins]]) -> None:
        """Record non-finite steps, which changed nothing, and the source rows of each."""
        noted = [*self._record.get("skipped", [])]
        noted += [{"step": step, "rows": rows} for step, rows in steps]
        self._change(skipped=noted[-_SKIPPED_KEPT:])
        self._write()

    def log(self, line: dict[str, float]) -> None:
        """Add a line to metrics.jsonl; run.json holds the latest loss and evaluation."""
        self._metrics.add(line)
        kept = {name for name in line if name.startswith("eval_")} | {"loss", "exact_match"}
        if not math.isfinite(line.get("loss", 0.0)):  # all steps since the last line were skipped
            kept -= {"loss"}
        latest = {name: line[name] for name in line if name in kept}
        self._change(step=int(line["step"]))
        self._change(metrics={**self._record.get("metrics", {}), **latest})
        behind = self._is_behind or self._uploads.error is not None
        if behind or time.monotonic() - self._noted_at > self._seconds:
            self._write()

    def add_rollouts(self, step: int, examples: list[Record]) -> None:
        """Keep completions of a step; rollouts.jsonl holds the last of them."""
        self._rollouts += [{"step": step, **example} for example in examples]
        del self._rollouts[:-_ROLLOUTS_KEPT]

    def flush(self) -> None:
        """Write all lines and rollouts so far; any thread may call it."""
        self._metrics.flush()
        with self._lock:  # of two threads the later one has more to write
            if self._rollouts:
                write_rollouts(self._folder, list(self._rollouts))

    def update(self, step: int, tokens: int, **facts: Any) -> None:
        """Record how far the run is, and further keys of run.json."""
        self._change(step=step, tokens=tokens, **facts)
        self._write()

    def log_base(self, measures: dict[str, float]) -> None:
        """Record the evaluation of the model before the first step."""
        self._metrics.add({"step": 0, "epoch": 0.0, **measures})
        self._change(before=measures)
        self._write()

    def add_answers(self, samples: list[Record], answers: list[str], when: str) -> None:
        """Add the answers `before` or `after` the training to samples.jsonl."""
        existing = {record["row"]: record for record in read_samples(self._folder)}
        blank: Record = {"before": None, "after": None}
        write_samples(
            self._folder,
            [
                {**blank, **existing.get(sample["row"], {}), **sample, when: text}
                for sample, text in zip(samples, answers, strict=True)
            ],
        )

    def set_result(self, result: str) -> None:
        """Record the name of the result, a folder in the run's folder."""
        self._change(result=result)

    def _change(self, **facts: Any) -> None:
        # A new record: another thread may be writing the old one.
        self._record = {**self._record, "updated_at": now(), **facts}

    def _write(self) -> None:
        """Write everything in a thread; later, if one still writes."""
        self._is_behind = not self._uploads.is_idle
        if not self._is_behind:
            self._noted_at = time.monotonic()
            self._uploads.start(self._write_all)

    def _write_all(self) -> None:
        self.flush()
        write_run(self._folder, self._record)


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
