"""How far two policies are apart, and how much of a gain a step may take at once."""

import torch


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
