"""Advantages: how much better a completion is than the average of its prompt.

The reward NaN marks a completion without any reward: means leave it out, its advantage is 0.
"""

from typing import Literal

import torch
import torch.distributed as dist

_TINY = 1e-4
"""Keeps the advantages of equal rewards at 0."""


def standard_deviation(values: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation over the last dimension, without NaN values.

    Returns:
        NaN where fewer than two values remain.
    """
    valid = ~values.isnan()
    count = valid.sum(-1)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()


def over_batch(values: torch.Tensor, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation over the values of all workers, without NaN values."""
    valid = ~values.isnan()
    total = torch.stack([values.nansum(), valid.sum().to(values.dtype)])
    if world_size > 1:
        dist.all_reduce(total)
    mean = total[0] / total[1]
    squares = (values - mean).square().nansum()
    if world_size > 1:
        dist.all_reduce(squares)
    return mean, torch.where(total[1] > 1, squares / (total[1] - 1), torch.nan).sqrt()


def group_relative(
    rewards: torch.Tensor, scale: Literal["group", "batch", "none"], world_size: int
) -> torch.Tensor:
    """Reward minus the mean of the prompt's completions, in standard deviations (GRPO, eq. 3, 4).

    Args:
        rewards: (prompts, generations).
        scale: divide by the standard deviation of the prompt's group, of the batch, or of none.
        world_size: number of workers that share the batch.
    """
    above = rewards - rewards.nanmean(-1, keepdim=True)
    if scale == "group":
        above = above / (standard_deviation(rewards)[:, None] + _TINY)
    elif scale == "batch":
        above = above / (over_batch(rewards, world_size)[1] + _TINY)
    return above.nan_to_num(0.0)


def leave_one_out(rewards: torch.Tensor, normalize: bool, world_size: int) -> torch.Tensor:
    """Reward minus the mean of the prompt's other completions (RLOO, eq. 6).

    Args:
        rewards: (prompts, generations).
        normalize: scale the batch's advantages to mean 0 and standard deviation 1.
        world_size: number of workers that share the batch.
    """
    others = (~rewards.isnan()).sum(-1, keepdim=True) - 1
    above = rewards - (rewards.nansum(-1, keepdim=True) - rewards) / others
    if normalize:
        mean, deviation = over_batch(above, world_size)
        above = (above - mean) / (deviation + _TINY)
    return above.nan_to_num(0.0)
