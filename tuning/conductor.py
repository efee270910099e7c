"""Decides which trial starts next, which is stopped early and when the sweep ends.

`ray_tune.run_trials` connects it to Ray Tune. This module does not use Ray, so tests and benchmarks
can simulate a search without training.
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
"""If the first trials all fail with the same error, the sweep ends after this many."""


class Conductor:
    """Decides which trial starts next, which is stopped and when the sweep ends.

    Args:
        sweep: its settings.
        study: suggests trials and stores their results.
        concurrency: maximum number of trials that run at the same time.
        seconds_before: seconds that earlier attempts at this sweep took.
        on_change: called after every change of a trial; with an `Ending` when the trial has ended.
        on_over: called once, when running trials must stop because the sweep is over.
        population: decides which trial trains next in population-based training; else None.
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
        self._stop_reasons: dict[int, str] = {}
        """By trial: why it must stop; empty text for a pruned one, else the error."""
        self._failures: list[tuple[str, int]] = []
        self._all_failed = True
        self._lock = threading.RLock()
        self.over: str | None = None
        """Why the sweep ended before all its trials ran; None while it goes on."""
        self.is_interrupted = False
        self.error: FinrayError | None = None

    @property
    def seconds(self) -> float:
        """Seconds that the sweep took so far, over all attempts."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """Seconds left of the time budget; None without a budget."""
        budget = self._sweep.time_budget
        return None if budget is None else max(0.0, budget - self.seconds)

    def interrupt(self) -> None:
        """Stop the sweep on request: running trials save a checkpoint and can be resumed later."""
        with self._lock:
            self.is_interrupted = True
            self._on_over()

    def end(self, reason: str) -> None:
        """End the sweep: no further trial starts, and running trials are pruned."""
        with self._lock:
            if self.over is not None:
                return
            self.over = reason
            self._on_over()
            if self._population is not None:
                for number in self._population.paused(self._running):
                    self._study.prune(number, f"stopped: {reason}", self._study.measures(number))
                    self._on_change(Ending(number, "pruned", reason))

    def next_trial(self) -> Assignment | None:
        """The next trial to start, or None if none can start now.

        `is_finished` says whether one can start later.
        """
        with self._lock:
            if self.is_finished or len(self._running) >= self._concurrency:
                return None
            if self._population is not None:
                for number, reason in self._population.finish_generation():
                    self._on_change(Ending(number, "pruned", reason))
                assignment = self._population.next_trial(self._running)
            else:
                assignment = self._study.ask(in_order=self._sweep.sampler == "grid")
                if assignment is None:
                    self.over = self._study.exhausted
            if assignment is None:
                return None
            self._running.add(assignment.number)
            self._on_change(None)
            return assignment

    @property
    def is_finished(self) -> bool:
        """True if no further trial will start."""
        if self.over is not None or self.is_interrupted:
            return True
        if self._population is not None:
            return self._population.is_finished
        return not self._study.has_unfinished and len(self._study.rows()) >= self._sweep.trials

    def report(self, number: int, tokens: int, value: float | None, is_last: bool) -> bool:
        """Record a measurement of a running trial. Returns True if the trial must stop.

        Args:
            number: the trial's number.
            tokens: trained tokens at the measurement.
            value: the objective; None if it was not measured.
            is_last: True after the trial's last step, when stopping it saves nothing.
        """
        with self._lock:
            if value is None:
                return False
            if not math.isfinite(value):
                self._stop_reasons[number] = f"the objective {self._metric.name} is {value}"
                return True
            if self._study.report(number, tokens, value, is_last):
                self._stop_reasons[number] = ""
            self._on_change(None)
            return number in self._stop_reasons

    def finish_trial(self, number: int, report: Record | None, error: str | None = None) -> None:
        """Record that a trial's process has ended.

        Args:
            number: the trial's number.
            report: the trial's last report; None if its process was lost.
            error: why the process was lost, if it was.
        """
        with self._lock:
            self._running.discard(number)
            ending = self._ending(number, report or {}, error)
            if ending is not None:
                self._check_end_of_sweep(ending, report or {})
            self._on_change(ending)

    def refuse_trial(self, number: int, error: FinrayError) -> None:
        """Record that a trial cannot start."""
        report = {"status": "failed", "error": str(error), "exit_code": error.exit_code}
        self.finish_trial(number, report)

    def _ending(self, number: int, report: Record, error: str | None) -> Ending | None:
        """Store how a trial ended; None for a trial that is only paused."""
        measures = report.get("measures") or {}
        status = report.get("status")
        stop_reason = self._stop_reasons.pop(number, None)
        if status == "finished":
            error = self._study.finish(number, measures)
            if error is None:
                return Ending(number, "finished", self._summary(measures))
        elif stop_reason == "":
            tokens = measures.get("tokens", 0)
            self._study.prune(number, f"pruned at {tokens:,.0f} tokens", measures)
            return Ending(number, "pruned", self._summary(measures))
        elif stop_reason is None and status != "failed" and error is None:
            if status == "paused" and self._population is not None and self.over is None:
                error = self._study.fault(measures)
                if error is not None:
                    self._study.fail(number, error, measures)
                    return Ending(number, "failed", error)
                self._all_failed = False
                self._population.reached_milestone(number, measures)
            if self.over is None:
                return None  # it has saved a checkpoint and is resumed later
            self._study.prune(number, f"stopped: {self.over}", measures)
            return Ending(number, "pruned", self.over)
        else:
            error = stop_reason or error or str(report.get("error") or "unknown")
            self._study.fail(number, error, measures)
        return Ending(number, "failed", str(error))

    def _summary(self, measures: Record) -> str:
        values = [(metric.name, measures.get(metric.name)) for metric in self._study.metrics]
        return ", ".join(f"{name} {value:.6g}" for name, value in values if value is not None)

    def _check_end_of_sweep(self, ending: Ending, report: Record) -> None:
        """End the sweep if `stop_when` or repeated failures demand it after this trial's end."""
        if ending.state == "failed":
            self._failures.append((ending.text, int(report.get("exit_code", 1))))
            self._check_failures()
            return
        self._all_failed = False
        bounds = self._sweep.stop_when
        rows = self._study.rows()
        if bounds.tokens is not None and sum(row["tokens"] for row in rows) >= bounds.tokens:
            self.end(f"{bounds.tokens:,} tokens have been trained")
        numbers = self._study.best()
        if not numbers:
            return
        best = [row for row in rows if row["number"] in numbers]
        value = best[0]["values"][0]  # stop_when.value needs a single objective, so one is best
        if bounds.value is not None and not self._metric.better(bounds.value, value):
            self.end(f"{self._metric.name} {value:.6g} reached stop_when.value {bounds.value:g}")
        if bounds.trials_without_gain is not None:
            # With several objectives a trial is a gain if it has joined the Pareto front.
            last = max(row["ended"] for row in best)
            since = [other for other in rows if other["ended"] and other["ended"] > last]
            if len(since) >= bounds.trials_without_gain:
                self.end(f"{len(since)} trials ended without an improvement")

    def _check_failures(self) -> None:
        errors = {re.sub(r"\d+", "#", text) for text, _ in self._failures}
        if not self._all_failed or len(self._failures) < SAME_FAILURES or len(errors) > 1:
            return
        text, code = self._failures[0]
        kind = InputError if code == InputError.exit_code else RunError
        self.error = kind(
            f"the first {SAME_FAILURES} trials all failed with the same error: {text}"
        )
        self.end("all trials failed")
