"""Cross-entropy of the next token, for supervised fine-tuning and pretraining."""

import torch
import torch.nn.functional as F

from ..data.batching import IGNORED, Batch
from .objective import Loss, Objective

_SLICE = 32


class TokenObjective(Objective):
    """Sum of the token losses; its loss unit is a trained token."""

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Cross-entropy in nats, summed over the trainable tokens."""
        log_probabilities = to_log_probabilities(self.kept_logits(model, batch))
        total = token_loss(log_probabilities, batch.targets)
        measures = measure(log_probabilities.detach(), batch.targets) if measured else None
        return Loss(total, measures)


def to_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax in float32, flattened to (tokens, vocabulary), for loss and measures."""
    return F.log_softmax(logits.flatten(0, 1).float(), dim=-1)


def token_loss(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies in nats over all targets that are not IGNORED."""
    return F.nll_loss(log_probabilities, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def measure(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums and counts of accuracy and entropy over the targets that are not IGNORED.

    Returns:
        [[correct tokens, tokens], [sum of entropies in nats, tokens]] in float64.
    """
    flat = targets.flatten()
    is_trained = flat != IGNORED
    chosen = log_probabilities.gather(1, flat.clamp(min=0)[:, None]).squeeze(1)
    correct = (chosen >= log_probabilities.amax(-1)) & is_trained
    # Slices stay in the processor's cache; all rows at once would be written to memory twice.
    entropies = torch.cat(
        [-torch.linalg.vecdot(rows.exp(), rows) for rows in torch.split(log_probabilities, _SLICE)]
    )
    count = is_trained.sum()
    return (
        torch.stack([correct.sum(), count, entropies[is_trained].sum(), count]).double().view(2, 2)
    )
