"""A metric that a run reports, with its direction."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """The name of a reported value, and which direction is better."""

    name: str
    mode: Literal["min", "max"]

    def better(self, value: float, other: float) -> bool:
        """True if `value` is strictly better than `other`."""
        return value < other if self.mode == "min" else value > other
