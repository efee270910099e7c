"""How far a run has come, and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Position:
    """Kept in every checkpoint; a step is `batch_size` positions of the stream."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent on optimizer steps, all attempts together."""


class Clock:
    """Times the steps, leaving out evaluations and saves."""

    def __init__(self, position: Position) -> None:
        self.step = position.step
        self._tokens = position.tokens
        self._since = time.monotonic()

    def lap(self, position: Position) -> float:
        """Tokens per second since the last lap; adds its time to the position."""
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        speed = (position.tokens - self._tokens) / elapsed
        position.seconds += elapsed
        self.step, self._tokens, self._since = position.step, position.tokens, now
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started
