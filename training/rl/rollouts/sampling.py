"""Samples tokens with random numbers that are drawn in advance.

Every (sequence, position) has its own uniform number, which selects the token by inverting the
cumulative distribution. This is exact to 2^-50, and independent of the rest of the batch.
"""

from typing import Any, Protocol

import torch
from transformers import LogitsProcessor

_ALMOST_ONE = 1.0 - 1e-12
"""Maximum of the uniform numbers: one that is rounded up to 1 would select no token."""
_UNIT = 2.0**50
"""What a probability of 1 counts as. Sums of whole numbers are the same in any order; a GPU adds up
floating-point numbers in one that changes, which `deterministic` refuses."""


class SamplingSettings(Protocol):
    """What decides the distribution that tokens are sampled from."""

    @property
    def temperature(self) -> float:
        """Divides the logits; above 0."""

    @property
    def top_k(self) -> int:
        """Number of tokens that are kept; 0 keeps all."""

    @property
    def top_p(self) -> float:
        """The kept tokens together have this probability."""


def probabilities(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """The distribution that tokens are sampled from: temperature, then top-k, then top-p.

    Args:
        logits: (sequences, vocabulary).
        settings: temperature, top_k and top_p.

    Returns:
        (sequences, vocabulary) in float64; rows add up to 1.
    """
    scaled = logits.double() / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        smallest = scaled.topk(settings.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if settings.top_p < 1.0:
        ordered, order = scaled.sort(descending=True)
        shares = _whole(ordered.softmax(-1))
        # A token is kept if the tokens before it do not reach top_p; the first is always kept.
        outside = shares.cumsum(-1) - shares >= settings.top_p * _UNIT
        scaled = scaled.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return scaled.softmax(-1)


def pick(shares: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Select a token of each sequence by inverting the cumulative distribution.

    Args:
        shares: probabilities, (sequences, vocabulary), in float64.
        uniform: random numbers, (sequences,), in [0, 1).

    Returns:
        (sequences,) token ids, none of a probability below 2^-51.
    """
    cumulative = _whole(shares).cumsum(-1)
    targets = (uniform.clamp(max=_ALMOST_ONE)[:, None] * cumulative[:, -1:]).long()
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)


def _whole(shares: torch.Tensor) -> torch.Tensor:
    """Probabilities as whole numbers, in units of 1 / _UNIT."""
    return (shares * _UNIT).round().long()


class Sampler(LogitsProcessor):
    """Makes greedy decoding choose the token that the random numbers select.

    Args:
        settings: temperature, top_k and top_p.
        uniform: random numbers, (sequences, positions), in [0, 1).
        prompt: width of the prompts in tokens, with their padding.
    """

    def __init__(self, settings: SamplingSettings, uniform: torch.Tensor, prompt: int) -> None:
        self._settings = settings
        self._uniform = uniform
        self._prompt = prompt

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Scores of 0 for the selected tokens, minus infinity for the others."""
        position = input_ids.shape[1] - self._prompt
        shares = probabilities(scores, self._settings)
        tokens = pick(shares, self._uniform[:, position])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
