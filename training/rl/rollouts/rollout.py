"""Requests for completions, and the completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One completion to be sampled."""

    prompt_ids: list[int]
    """Ending where the completion begins."""
    seed: tuple[int, ...]
    """Equal seeds draw equal numbers."""

    def random(self) -> np.random.Generator:
        """The numbers that this completion is drawn with."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Rollout:
    """A completion."""

    ids: list[int]
    """Its tokens, with the one that ended it."""
    ended: bool
    """Whether a token ended it; otherwise it was cut off."""


class Rollouts(Protocol):
    """Something that samples completions of the model as it is now."""

    def sample(self, requests: Sequence[Request]) -> list[Rollout]:
        """A completion to each request."""
