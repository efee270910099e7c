"""Writes the files of the run's folder during training, on rank 0."""

import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from ..common.errors import RunError
from ..common.formatting import one_line
from ..common.secrets import redact
from ..common.storage import Folder
from ..common.uploader import Uploader
from ..config.recipe import Recipe
from ..data.origin import Origins
from .checkpoint import Choice
from .metrics_log import MetricsLog
from .run_folder import (
    RUN_FILE,
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
_NOTICES_KEPT = 50


class RunRecorder:
    """metrics.jsonl, samples.jsonl, rollouts.jsonl and run.json of one run.

    A slow or unreachable store does not stop the training: a later write contains everything that
    is missing. The end of the context writes the rest, and raises a RunError if this fails.

    Args:
        folder: the run's folder.
        recipe: the run's recipe.
        step: the step from which this attempt starts.
    """

    def __init__(self, folder: Folder, recipe: Recipe, step: int) -> None:
        self._folder = folder
        self._metrics = MetricsLog(folder, step, "tensorboard" in recipe.log.to)
        self._record = read_run(folder) or {}
        self._uploads = Uploader()
        self._lock = threading.Lock()
        self._is_behind = False
        """True if a write was due and could not start."""
        self._is_started = False
        self._seconds = _HEARTBEAT_SECONDS if folder.local is not None else _REMOTE_SECONDS
        self._noted_at = time.monotonic()
        # Later steps were undone by a crash.
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
            choice: the checkpoint from which it resumes.
            world_size: number of workers.
            facts: further keys of run.json.
            cause: why the previous attempt ended; None if there was none.
        """
        self._change(**facts, world_sizes=[*self._record.get("world_sizes", []), world_size])
        if "skipped" in self._record:  # later steps are undone
            skipped = [step for step in self._record["skipped"] if step["step"] <= choice.step]
            self._change(skipped=skipped)
        restarts = self._record.get("restarts", [])
        hangs = self._new_hangs(restarts, cause or "")
        if choice.name is not None or choice.skipped or cause or hangs:
            start = f"resumed from {choice.name}" if choice.name else "restarted from the beginning"
            before = [cause] if cause else []
            reason = redact("; ".join((*before, start, *choice.skipped, *hangs)))
            self._change(restarts=[*restarts, {"step": choice.step, "reason": reason}])
        write_run(self._folder, self._record)
        self._is_started = True

    def check_folder(self) -> None:
        """Check that the run's folder is still there: a write would silently make a new one.

        Raises:
            RunError: it was deleted after the start.
        """
        if self._is_started and not self._folder.exists(RUN_FILE):
            raise RunError(
                f"{self._folder}: the run's folder, or {RUN_FILE} in it, was deleted while the run "
                "wrote into it; the run has ended"
            )

    def _new_hangs(self, restarts: list[Record], cause: str) -> list[str]:
        """A line for each worker that hung since the last start; each left a stacks file."""
        reported = " ".join((cause, *(restart.get("reason") or "" for restart in restarts)))
        names = (self._folder / STACKS_FOLDER).names()
        return [f"a step hung: {STACKS_FOLDER}/{name}" for name in names if name not in reported]

    def add_skipped(self, steps: list[tuple[int, Origins]], reason: str) -> None:
        """Record steps that changed no weights, with the source rows of each.

        Args:
            steps: the steps and their rows.
            reason: why, in a few words: "not finite".
        """
        noted = [*self._record.get("skipped", [])]
        noted += [{"step": step, "reason": reason, "rows": rows} for step, rows in steps]
        self._change(skipped=noted[-_SKIPPED_KEPT:])
        self._write()

    def log(self, line: dict[str, float]) -> None:
        """Add a line to metrics.jsonl; run.json holds the latest loss and evaluation.

        Raises:
            RunError: the run's folder, on a disk, was deleted.
        """
        if self._folder.local is not None:
            self.check_folder()
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
        """Add completions of a step; rollouts.jsonl keeps the latest ones."""
        self._rollouts += [{"step": step, **example} for example in examples]
        del self._rollouts[:-_ROLLOUTS_KEPT]

    def flush(self) -> None:
        """Write all metrics and rollouts so far; any thread may call this.

        Raises:
            RunError: the run's folder was deleted.
        """
        self.check_folder()
        self._metrics.flush()
        with self._lock:  # so that an older write cannot replace a newer one
            if self._rollouts:
                write_rollouts(self._folder, list(self._rollouts))

    def update(self, step: int, tokens: int, **facts: Any) -> None:
        """Record the current step, the tokens so far, and further keys of run.json."""
        self._change(step=step, tokens=tokens, **facts)
        self._write()

    def add_notice(self, text: str) -> None:
        """Record what a user should see, in one line; the same is recorded once."""
        notices = self._record.get("notices") or []
        line = redact(one_line(text))
        if line not in notices:
            self._change(notices=[*notices, line][-_NOTICES_KEPT:])
            self._write()

    def log_base(self, metrics: dict[str, float]) -> None:
        """Record the evaluation of the base model, before the first step."""
        self._metrics.add({"step": 0, "epoch": 0.0, **metrics})
        self._change(before=metrics)
        self._write()

    def add_answers(self, samples: list[Record], answers: list[str], when: str) -> None:
        """Add the model's answers from `before` or `after` the training to samples.jsonl."""
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
        """Record the name of the result's folder, which is in the run's folder."""
        self._change(result=result)

    def set_over(self, reason: str) -> None:
        """Record why the run ends before its last step."""
        self._change(over=reason)

    def _change(self, **facts: Any) -> None:
        # A new record, because another thread may be writing the old one.
        self._record = {**self._record, "updated_at": now(), **facts}

    def _write(self) -> None:
        """Write everything in a thread; if a write is still running, mark this one as due."""
        self._is_behind = not self._uploads.is_idle
        if not self._is_behind:
            self._noted_at = time.monotonic()
            self._uploads.start(self._write_all)

    def _write_all(self) -> None:
        self.flush()
        write_run(self._folder, self._record)


def update_run(folder: Folder, change: Callable[[Record], None]) -> None:
    """Read run.json, change it, and write it back. Only one process does this at a time: the driver
    before and after the workers run, rank 0 while they train."""
    record = read_run(folder) or {}
    change(record)
    record["updated_at"] = now()
    write_run(folder, record)


def now() -> str:
    """The current time as ISO 8601 in UTC, in milliseconds: short runs are sorted by it, too."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
