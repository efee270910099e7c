"""Log-probabilities of sampled tokens, and how far two policies are apart."""

import torch

from ..data.batching import IGNORED


def token_log_probabilities(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probability (nats) of each target: (sequences, columns) in float32, 0 where IGNORED.

    Args:
        logits: (sequences, columns, vocabulary).
        targets: (sequences, columns).
        temperature: that of the sampling; the policy is what is sampled from.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    return (chosen - scaled.logsumexp(-1)).masked_fill(targets == IGNORED, 0.0)


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of each sampled token, never below 0 (k3 of Schulman, 2020,
    http://joschu.net/blog/kl-approx.html)."""
    ratio = reference - policy
    return ratio.exp() - ratio - 1


def clipped_gain(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective, and where clipping took its gradient.

    Args:
        ratio: probability now over that when it was sampled; (sequences, …).
        advantages: broadcast against it.
        low: by how much the ratio may fall below 1.
        high: by how much it may exceed 1.
    """
    clamped = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * advantages, clamped * advantages)
    outside = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return gain, outside
