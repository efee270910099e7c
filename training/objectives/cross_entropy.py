"""Cross-entropy of the next token, for supervised fine-tuning and pretraining."""

import torch

from ..data.batching import Batch
from .objective import Loss, Objective, TokenLosses


class TokenObjective(Objective):
    """Sum of the token losses; its loss unit is a trained token."""

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Cross-entropy in nats, summed over the trained tokens.

        While training, each token adds the model's auxiliary loss, if there is one.
        """
        of_tokens = self.token_losses(model, batch, summed=True, measured=measured)
        total = of_tokens.losses
        if of_tokens.auxiliary is not None and torch.is_grad_enabled():
            total = total + of_tokens.auxiliary * batch.loss_units
        return Loss(total, measures_of(of_tokens, batch) if measured else None)


def measures_of(of_tokens: TokenLosses, batch: Batch) -> torch.Tensor:
    """Sums and counts of accuracy and entropy.

    Returns:
        [[correct tokens, tokens], [sum of entropies in nats, tokens]] in float64.
    """
    sums = of_tokens.statistics
    return torch.stack([sums, torch.full_like(sums, batch.loss_units)], dim=1)
