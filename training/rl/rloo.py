"""REINFORCE with a leave-one-out baseline.

Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740; clipped as in PPO.
"""

from typing import cast

import torch

from ..config.methods import RlooMethod
from ..data.batching import Batch
from ..objectives.objective import Loss, Setup
from .advantages import leave_one_out
from .online import OnlineObjective
from .policy import clipped_gain


class RlooObjective(OnlineObjective):
    """Treats a whole completion as one action; the loss unit is a completion."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._own = cast(RlooMethod, setup.recipe.method)
        self.needs_old = self._own.passes > 1 or self._own.beta > 0

    def advantages(self, rewards: torch.Tensor, divergences: torch.Tensor | None) -> torch.Tensor:
        """Leave-one-out advantages of the rewards minus beta times the divergences."""
        if divergences is not None:
            rewards = rewards - self._own.beta * divergences.view(rewards.shape)
        return leave_one_out(rewards, self._own.normalize_advantages, self.world_size)

    def weigh(self, mask: torch.Tensor, tokens: int, sequences: int) -> tuple[torch.Tensor, int]:
        """Equal weights, so that a completion's tokens are summed."""
        return mask, sequences

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Sum of the completions' clipped losses."""
        now = self.log_probabilities(model, batch)
        old = batch.extra.get("old", now.detach())
        advantages = batch.extra["advantages"].to(now.dtype)
        gain, outside = clipped_gain(
            (now - old).sum(1).exp(), advantages, self._own.epsilon, self._own.clip_high
        )
        if not measured:
            return Loss(-gain.sum(), None)
        clipped = outside.float()[: batch.loss_units]
        return Loss(-gain.sum(), self.measured(batch, now.detach(), clipped))
