"""What the preference methods share: log-probabilities of answers, and what is measured."""

import torch

from ..data.batching import IGNORED, Batch


def answer_log_probabilities(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability (nats) of each answer: (sequences,), in float32.

    Args:
        logits: of the kept columns, (sequences, columns, vocabulary).
        batch: its targets say which tokens are the answer's.
    """
    targets = batch.targets
    chosen = logits.gather(2, targets.clamp(min=0)[..., None]).squeeze(2).float()
    of_tokens = chosen - logits.float().logsumexp(-1)
    return (of_tokens * (targets != IGNORED)).sum(1)


@torch.no_grad()
def preference_measures(
    chosen: torch.Tensor, rejected: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Sums and counts of: whether the chosen answer scores higher, by how much, both scores.

    Args:
        chosen: scores of the chosen answers, (pairs,).
        rejected: scores of the rejected ones.
        weight: 1 for a pair, 0 for filling.
    """
    accuracy = (chosen > rejected).to(chosen.dtype)
    values = torch.stack([accuracy, chosen - rejected, chosen, rejected]).double()
    sums = (values * weight).sum(1)
    return torch.stack([sums, weight.double().sum().expand_as(sums)], dim=1)
