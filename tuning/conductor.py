"""Decides what trial runs next, which is given up, and when the sweep is over.

Ray Tune asks and tells it through `execute`; it knows nothing of Ray, so that a search can be
played through without training anything.
"""

import math
import re
import threading
import time
from collections.abc import Callable

from ..training.common.errors import FinrayError, InputError, RunError
from ..training.config.metric import Metric
from ..training.records.run_folder import Record
from .pbt import Population
from .progress import Ending
from .study import Assignment, SweepStudy
from .sweep import Sweep

SAME_FAILURES = 3
"""So many trials that fail alike, and none that does not, end a sweep."""


class Conductor:
    """The sweep's course.

    Args:
        sweep: its settings.
        study: where trials come from and results go.
        concurrency: trials at a time.
        seconds_before: that earlier attempts took.
        on_change: called whenever something is known of a trial; with an `Ending` at its end.
        on_over: called once, when running trials shall stop because the sweep is over.
        population: with population-based training, says who trains next.
    """

    def __init__(
        self,
        sweep: Sweep,
        study: SweepStudy,
        concurrency: int,
        seconds_before: float,
        on_change: Callable[[Ending | None], None],
        on_over: Callable[[], None],
        population: Population | None = None,
    ) -> None:
        self._sweep = sweep
        self._study = study
        self._metric: Metric = study.metrics[0]
        self._concurrency = concurrency
        self._on_change = on_change
        self._on_over = on_over
        self._population = population
        self._started = time.monotonic() - seconds_before
        self._running: set[int] = set()
        self._given_up: dict[int, str] = {}
        self._failures: list[tuple[str, int]] = []
        self._all_failed = True
        self._lock = threading.RLock()
        self.over: str | None = None
        """Why the sweep is over before its trials are used up."""
        self.is_interrupted = False
        self.error: FinrayError | None = None

    @property
    def seconds(self) -> float:
        """That the sweep took so far, all attempts together."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """Of the time budget."""
        budget = self._sweep.time_budget
        return None if budget is None else max(0.0, budget - self.seconds)

    def interrupt(self) -> None:
        """Somebody wants the sweep to stop: running trials are saved, and taken up again later."""
        with self._lock:
            self.is_interrupted = True
            self._on_over()

    def end(self, reason: str) -> None:
        """The sweep is over: no trial starts any more, and running ones are given up."""
        with self._lock:
            if self.over is not None:
                return
            self.over = reason
            self._on_over()
            if self._population is not None:
                for number in self._population.parked(self._running):
                    self._study.prune(number, f"stopped: {reason}", self._study.measures(number))
                    self._on_change(Ending(number, "pruned", reason))

    def next(self) -> Assignment | None:
        """The next trial; None for none now, and `is_finished` tells whether there will be one."""
        with self._lock:
            if self.is_finished or len(self._running) >= self._concurrency:
                return None
            if self._population is not None:
                for number, reason in self._population.turn():
                    self._on_change(Ending(number, "pruned", reason))
                assignment = self._population.next(self._running)
            else:
                assignment = self._study.ask(only_queued=self._sweep.sampler == "grid")
                if assignment is None and self.over is None:
                    self.over = "there is no further setting to try"
            if assignment is None:
                return None
            self._running.add(assignment.number)
            self._on_change(None)
            return assignment

    @property
    def is_finished(self) -> bool:
        """Whether no further trial will start."""
        if self.over is not None or self.is_interrupted:
            return True
        if self._population is not None:
            return self._population.is_finished
        return not self._study.has_unfinished and len(self._study.rows()) >= self._sweep.trials

    def reported(self, number: int, tokens: int, value: float | None, is_last: bool) -> bool:
        """Take a measurement on the way (or after the last step, when nothing is left to save);
        returns whether the trial is given up."""
        with self._lock:
            if value is None:
                return False
            if not math.isfinite(value):
                self._given_up[number] = f"the objective {self._metric.name} is {value}"
                return True
            if self._study.report(number, tokens, value, is_last):
                self._given_up[number] = ""
            self._on_change(None)
            return number in self._given_up

    def ended(self, number: int, report: Record | None, error: str | None = None) -> None:
        """Take a trial's end.

        Args:
            number: the trial's.
            report: its last report; None where its process was lost.
            error: what Ray says of a lost process.
        """
        with self._lock:
            self._running.discard(number)
            ending = self._conclude(number, report or {}, error)
            if ending is not None:
                self._judge(ending, report or {})
            self._on_change(ending)

    def _conclude(self, number: int, report: Record, error: str | None) -> Ending | None:
        measures = report.get("measures") or {}
        status = report.get("status")
        given_up = self._given_up.pop(number, None)
        if status == "finished":
            error = self._study.finish(number, measures)
            if error is None:
                return Ending(number, "finished", self._told(measures))
        elif given_up == "":
            tokens = measures.get("tokens", 0)
            self._study.prune(number, f"pruned at {tokens:,.0f} tokens", measures)
            return Ending(number, "pruned", self._told(measures))
        elif given_up is None and status != "failed" and error is None:
            if status == "paused" and self._population is not None and self.over is None:
                self._all_failed = False
                self._population.stands(number, measures)
            if self.over is None:
                return None  # saved; taken up again at its turn, or when the sweep goes on
            self._study.prune(number, f"stopped: {self.over}", measures)
            return Ending(number, "pruned", self.over)
        else:
            error = given_up or error or str(report.get("error") or "unknown")
            self._study.fail(number, error, measures)
        return Ending(number, "failed", str(error))

    def _told(self, measures: Record) -> str:
        values = [(metric.name, measures.get(metric.name)) for metric in self._study.metrics]
        return ", ".join(f"{name} {value:.6g}" for name, value in values if value is not None)

    def _judge(self, ending: Ending, report: Record) -> None:
        """End the sweep where this trial's end is a reason to."""
        if ending.state == "failed":
            self._failures.append((ending.text, int(report.get("exit_code", 1))))
            self._check_failures()
            return
        self._all_failed = False
        bounds = self._sweep.stop_when
        rows = self._study.rows()
        if bounds.tokens is not None and sum(row["tokens"] for row in rows) >= bounds.tokens:
            self.end(f"{bounds.tokens:,} tokens are trained")
        best = self._study.best()
        if not best:
            return
        row = next(row for row in rows if row["number"] == best[0])
        value = row["values"][0]
        if bounds.value is not None and not self._metric.better(bounds.value, value):
            self.end(f"{self._metric.name} {value:.6g} is good enough")
        if bounds.trials_without_gain is not None:
            since = [one for one in rows if one["ended"] and one["ended"] > row["ended"]]
            if len(since) >= bounds.trials_without_gain:
                self.end(f"{len(since)} trials without a better one")

    def _check_failures(self) -> None:
        alike = {re.sub(r"\d+", "#", text) for text, _ in self._failures}
        if not self._all_failed or len(self._failures) < SAME_FAILURES or len(alike) > 1:
            return
        text, code = self._failures[0]
        kind = InputError if code == InputError.exit_code else RunError
        self.error = kind(
            f"the first {SAME_FAILURES} trials all failed with the same error: {text}"
        )
        self.end("all trials fail")
