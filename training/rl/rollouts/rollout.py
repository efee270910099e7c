"""Requests for completions, and the interface that samples them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    prompt_ids: list[int]
    """Token ids of the prompt, up to the start of the completion."""
    seed: tuple[int, ...]
    """Seed of the completion's random numbers."""

    def random(self) -> np.random.Generator:
        """A new generator of the completion's random numbers."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Rollout:
    """A sampled completion."""

    ids: list[int]
    """Token ids, including the token that ended the completion."""
    ended: bool
    """True if a stop token ended it, False if it was cut off at the maximum length."""


class Rollouts(Protocol):
    """Samples completions from the model with its present weights."""

    def sample(self, requests: Sequence[Request]) -> list[Rollout]:
        """Sample a completion for each request, in the same order."""
