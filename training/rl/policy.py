"""The divergence between two policies, and PPO's clipped objective."""

import torch


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy || reference) for each sampled token, at least 0.

    It is k3 of Schulman, 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        policy: log-probabilities of the tokens.
        reference: log-probabilities of the tokens under the reference, of the same shape.
    """
    ratio = reference - policy
    return ratio.exp() - ratio - 1


def clipped_gain(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective, and where clipping removes the gradient.

    Args:
        ratio: probability now divided by that at sampling, (sequences, …).
        advantages: a tensor that broadcasts against `ratio`.
        low: how far the ratio may fall below 1.
        high: how far the ratio may exceed 1.

    Returns:
        The gain, and a bool tensor that is True where it is clipped; both of the ratio's shape.
    """
    clamped = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * advantages, clamped * advantages)
    outside = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return gain, outside
