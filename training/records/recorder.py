"""What rank 0 writes into the run's folder while the run goes on."""

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ..common.errors import RunError
from ..common.secrets import redact
from ..common.storage import Folder
from ..common.uploader import Uploads
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


class Books:
    """metrics.jsonl, samples.jsonl, rollouts.jsonl and run.json of one run.

    A store that is slow, or away for a while, does not hold up the training: what it lacks is
    written when it can be. As a context they write at its end what is left to write, and raise a
    RunError where the store does not take it.

    Args:
        folder: the run's folder.
        recipe: what is run.
        step: where this attempt starts.
    """

    def __init__(self, folder: Folder, recipe: Recipe, step: int) -> None:
        self._folder = folder
        self._metrics = MetricsLog(folder, step, "tensorboard" in recipe.log.to)
        self._record = read_run(folder) or {}
        self._uploads = Uploads()
        self._lock = threading.Lock()
        self._is_behind = False
        """Whether the folder lacks something that should be there by now."""
        self._seconds = _HEARTBEAT_SECONDS if folder.local is not None else _REMOTE_SECONDS
        self._noted_at = time.monotonic()
        # Those of later steps belong to a part of the run that a crash undid.
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
            if error is None:  # else that one tells more
                raise

    def open(
        self, choice: Choice, world_size: int, facts: dict[str, Any], cause: str | None
    ) -> None:
        """Note who trains, where this attempt starts, and what ended the one before."""
        self._change(**facts, world_sizes=[*self._record.get("world_sizes", []), world_size])
        if "skipped" in self._record:  # those of later steps are undone
            skipped = [one for one in self._record["skipped"] if one["step"] <= choice.step]
            self._change(skipped=skipped)
        restarts = self._record.get("restarts", [])
        hangs = self._untold_hangs(restarts)
        if choice.name is not None or choice.passed_over or cause or hangs:
            start = f"resumed from {choice.name}" if choice.name else "started anew"
            before = [cause] if cause else []
            reason = redact("; ".join((*before, start, *choice.passed_over, *hangs)))
            self._change(restarts=[*restarts, {"step": choice.step, "reason": reason}])
        write_run(self._folder, self._record)

    def _untold_hangs(self, restarts: list[Record]) -> list[str]:
        """Workers that gave up since the last start: they leave nothing but their stacks."""
        told = " ".join(restart["reason"] for restart in restarts)
        names = (self._folder / STACKS_FOLDER).names()
        return [f"a step hung: {STACKS_FOLDER}/{name}" for name in names if name not in told]

    def skipped(self, steps: list[tuple[int, Origins]]) -> None:
        """Note steps that were skipped, because they were not finite, and the rows of each."""
        noted = [*self._record.get("skipped", [])]
        noted += [{"step": step, "rows": rows} for step, rows in steps]
        self._change(skipped=noted[-_SKIPPED_KEPT:])
        self._write()

    def logged(self, line: dict[str, float]) -> None:
        """Add a line to metrics.jsonl; the loss and what tells how good the model is are
        remembered for run.json."""
        self._metrics.add(line)
        told = {name for name in line if name.startswith("eval_")} | {"loss", "exact_match"}
        if not math.isfinite(line.get("loss", 0.0)):  # all steps since the last line were skipped
            told -= {"loss"}
        latest = {name: line[name] for name in line if name in told}
        self._change(step=int(line["step"]))
        self._change(metrics={**self._record.get("metrics", {}), **latest})
        behind = self._is_behind or self._uploads.error is not None
        if behind or time.monotonic() - self._noted_at > self._seconds:
            self._write()

    def sampled(self, step: int, examples: list[Record]) -> None:
        """Remember completions of a step; rollouts.jsonl holds the last of them."""
        self._rollouts += [{"step": step, **example} for example in examples]
        del self._rollouts[:-_ROLLOUTS_KEPT]

    def flush(self) -> None:
        """Write what was logged and sampled so far, in the calling thread, which may be any."""
        self._metrics.flush()
        with self._lock:  # two threads may write, and the later one knows more
            if self._rollouts:
                write_rollouts(self._folder, list(self._rollouts))

    def note_progress(self, step: int, tokens: int, **facts: Any) -> None:
        """Write all that is known so far."""
        self._change(step=step, tokens=tokens, **facts)
        self._write()

    def measured_base(self, measures: dict[str, float]) -> None:
        """Note what the model could do before the first step."""
        self._metrics.add({"step": 0, "epoch": 0.0, **measures})
        self._change(before=measures)
        self._write()

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
        self._change(result=result)

    def _change(self, **facts: Any) -> None:
        # A new record: another thread may be writing the old one.
        self._record = {**self._record, "updated_at": now(), **facts}

    def _write(self) -> None:
        """Write all that is known, beside the training; later, where that is still under way."""
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
