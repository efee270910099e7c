"""Group relative policy optimisation, with variants that average the loss differently.

GRPO: Shao et al., 2024, https://arxiv.org/abs/2402.03300, eq. 3 and 4.
DAPO: Yu et al., 2025, https://arxiv.org/abs/2503.14476.
Dr. GRPO: Liu et al., 2025, https://arxiv.org/abs/2503.20783.
"""

from typing import cast

import torch

from ..config.methods import GrpoMethod
from ..data.batching import IGNORED, Batch
from ..objectives.objective import Loss, Setup
from .advantages import group_relative
from .online import OnlineObjective
from .policy import clipped_gain, divergence


class GrpoObjective(OnlineObjective):
    """Treats every token as one action with the completion's advantage."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._own = cast(GrpoMethod, setup.recipe.method)
        self.needs_old = self._own.passes > 1

    def advantages(self, rewards: torch.Tensor, divergences: torch.Tensor | None) -> torch.Tensor:
        """Advantages relative to the prompt's group, (prompts, generations)."""
        return group_relative(rewards, self._own.scale_rewards, self.world_size)

    def weigh(self, mask: torch.Tensor, tokens: int, sequences: int) -> tuple[torch.Tensor, int]:
        """Token weights and loss units of the recipe's `method.loss`."""
        match self._own.loss:
            case "dapo":
                return mask, tokens
            case "grpo":
                return mask / mask.sum(1, keepdim=True).clamp(min=1), sequences
            case "bnpo":
                return mask / max(tokens, 1), int(sequences > 0)
            case "dr_grpo":
                return mask / self._own.max_completion, sequences

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Weighted sum of the clipped losses and the divergences of all tokens."""
        now = self.log_probabilities(model, batch)
        old = batch.extra.get("old", now.detach())
        gain, outside = clipped_gain(
            (now - old).exp(),
            batch.extra["advantages"].to(now.dtype)[:, None],
            self._own.epsilon,
            self._own.clip_high,
        )
        losses = -gain
        if self._own.beta > 0:
            losses = losses + self._own.beta * divergence(now, batch.extra["reference"])
        total = (losses * batch.extra["weights"].to(now.dtype)).sum()
        if not measured:
            return Loss(total, None)
        clipped = outside.float().masked_fill(batch.targets == IGNORED, torch.nan)
        return Loss(total, self.measured(batch, now.detach(), clipped))
