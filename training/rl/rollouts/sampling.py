"""Samples tokens with random numbers that are drawn in advance.

Every (sequence, position) has its own uniform number, which selects the token by inverting the
cumulative distribution of the weights. This is exact to 2^-50, and independent of the rest of the
batch.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessor

from ...common.errors import RunError

_ALMOST_ONE = 1.0 - 1e-12
"""Maximum of the uniform numbers: one that is rounded up to 1 would select no token."""
_UNIT = 2.0**50
"""What a probability of 1 counts as. Cumulative sums of whole numbers are the same in any order; a
GPU adds up floating-point numbers in one that changes, which `deterministic` refuses."""
_BLOCK = 128
"""Tokens; sums of blocks cost less than a cumulative sum over the vocabulary."""


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


def weights(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """What the probabilities of tokens are in proportion to: temperature, then top-k, then top-p.

    Args:
        logits: (sequences, vocabulary), in float32 or wider.
        settings: temperature, top_k and top_p.

    Returns:
        (sequences, vocabulary) of the logits' type; the largest of a sequence is 1.
    """
    scaled = logits if settings.temperature == 1.0 else logits / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        smallest = scaled.topk(settings.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if settings.top_p < 1.0:
        ordered, order = scaled.sort(descending=True)
        shares = _whole(ordered.double().softmax(-1))
        # A token is kept if the tokens before it do not reach top_p; the first is always kept.
        outside = shares.cumsum(-1) - shares >= round(settings.top_p * _UNIT)
        scaled = scaled.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return (scaled - scaled.amax(-1, keepdim=True)).exp_()


def pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Select a token of each sequence by inverting the cumulative distribution: first a block of
    the vocabulary, then a token in it.

    Args:
        weights: not negative, (sequences, vocabulary).
        uniform: random numbers, (sequences,), in [0, 1).

    Returns:
        (sequences,) token ids, none of weight 0, or of a probability below 2^-50.

    Raises:
        RunError: weights are not finite.
    """
    if rest := -weights.shape[-1] % _BLOCK:
        weights = pad(weights, (0, rest))
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    sums = _whole(blocks.sum(-1, dtype=torch.float64))
    cumulative = sums.cumsum(-1)
    if not bool((cumulative[:, -1] > 0).all()):  # on a GPU the next index would end the process
        raise RunError(
            "the model's logits are not finite, so that no token can be sampled; lower "
            "optim.learning_rate, or set model.dtype: float32 if it computes in float16"
        )
    targets = _share_of(uniform[:, None], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, targets, right=True)
    own = sums.gather(1, block)
    left = targets - (cumulative.gather(1, block) - own)
    chosen = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double()
    inside = _whole(chosen).cumsum(-1)
    targets = _share_of((left + 0.5) / own, inside[:, -1:])
    return (block * _BLOCK + torch.searchsorted(inside, targets, right=True)).squeeze(1)


def _share_of(share: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A share in [0, 1) of a whole number, which is less than that."""
    return (share.double().clamp(max=_ALMOST_ONE) * total).long()


def _whole(weights: torch.Tensor) -> torch.Tensor:
    """The probabilities of weights in float64 as whole numbers, in units of 1 / _UNIT."""
    return (weights / weights.sum(-1, keepdim=True) * _UNIT).round().long()


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
        tokens = pick(weights(scores, self._settings), self._uniform[:, position])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
