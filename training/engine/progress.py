"""The progress of a run, and the time of its steps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from ..config.metric import Metric

PROGRESS_FILE = "position.json"
"""File with the progress in every checkpoint."""


@dataclass
class TrainingProgress:
    """The run's position, saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent on optimizer steps, in all attempts together."""
    best: float | None = None
    """The best value of the watched metric so far, and the step at which it was measured."""
    best_step: int = 0
    waited: int = 0
    """Measurements since then."""
    measured_step: int = 0
    """The step of the last of them."""
    watched: str = ""
    """The metric that they are of."""

    def watch(self, metric: Metric) -> None:
        """Forget the measurements so far if they are of another metric."""
        if self.watched not in ("", metric.name):
            self.best, self.best_step, self.waited = None, 0, 0
        self.watched = metric.name

    def measured(self, value: float | None, metric: Metric) -> None:
        """Note a measurement of the watched metric; one that is no finite number is no gain."""
        if self.step <= self.measured_step:  # once more, by an attempt that only has to finish
            return
        self.watch(metric)
        self.measured_step = self.step
        is_finite = value is not None and math.isfinite(value)
        if is_finite and (self.best is None or metric.better(cast(float, value), self.best)):
            self.best, self.best_step, self.waited = value, self.step, 0
        else:
            self.waited += 1


class StepTimer:
    """Measures the time of steps, without evaluations and saves."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.step = progress.step
        """The step at the last tick."""
        self._tokens = progress.tokens
        self._since = time.monotonic()

    def tick(self, progress: TrainingProgress) -> float:
        """Tokens per second since the last tick; adds the time since then to the progress."""
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        speed = (progress.tokens - self._tokens) / elapsed
        progress.seconds += elapsed
        self.step, self._tokens, self._since = progress.step, progress.tokens, now
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the timer does not count the time."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started
