"""Common parts of the objectives on pairs of answers."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from ..data.batching import IGNORED, Batch, Rows, collate_pairs
from ..data.documents import moved
from ..models.devices import sum_type
from .objective import Loss, Objective, Setup

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of pairs of answers under a model; all tensors are (pairs,), float32."""

    chosen: torch.Tensor
    """Log-probability (nats) of the whole answer."""
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    """Number of tokens of the chosen answer."""
    rejected_tokens: torch.Tensor

    @property
    def means(self) -> "Answers":
        """The same answers with log-probabilities per token."""
        return replace(
            self,
            chosen=self.chosen / self.chosen_tokens,
            rejected=self.rejected / self.rejected_tokens,
        )


@dataclass(frozen=True)
class Comparison:
    """A method's losses and rewards for a batch of pairs."""

    losses: torch.Tensor
    """(pairs,)"""
    chosen_rewards: torch.Tensor
    """(pairs,): the rewards that the method implies for the chosen answers."""
    rejected_rewards: torch.Tensor
    imitation: torch.Tensor
    """Sum of the cross-entropies of the chosen texts' tokens, a scalar."""


class PairObjective(Objective):
    """A loss on each pair (the loss unit), and optionally the chosen texts' cross-entropy.

    The cross-entropy is the mean over the tokens of the global batch, independent of the number of
    workers and the size of the microbatches.
    """

    def __init__(self, setup: Setup, imitation_weight: float = 0.0) -> None:
        super().__init__(setup)
        self._imitation_weight = imitation_weight

    @abstractmethod
    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """Losses and rewards of the pairs of a batch."""

    def collate(self, rows: Rows) -> Batch:
        """The rows as tensors: first all chosen answers, then the rejected ones."""
        return collate_pairs(rows, self.assemble)

    def with_reference(self, batch: Batch, split: Split) -> Batch:
        """The batch with the reference's log-probabilities, if the method uses a reference."""
        del split
        return batch

    def batches(self, step: int, rows: Rows) -> list[Batch]:
        """The step's batches; `extra["pairs_per_token"]` is pairs over trained chosen tokens."""
        batches = [self.with_reference(batch, "train") for batch in super().batches(step, rows)]
        if self._imitation_weight == 0:
            return batches
        counts = [sum(batch.loss_units for batch in batches), sum(map(_imitated, batches))]
        ratio = moved(torch.tensor(counts, dtype=sum_type(self.device)), self.device)
        ratio = self._sum_over_workers(ratio)
        share = ratio[0] / ratio[1].clamp(min=1)
        return [batch.having(pairs_per_token=share) for batch in batches]

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Sum of the pairs' losses, plus the weighted cross-entropy scaled to pairs.

        Divided by the number of pairs, the cross-entropy is its mean per token.
        """
        compared = self.compare(model, batch)
        total = compared.losses.sum()
        if self._imitation_weight > 0:
            weight = self._imitation_weight * batch.extra["pairs_per_token"]
            total = total + weight.to(total.dtype) * compared.imitation
        return Loss(total, preference_measures(compared) if measured else None)

    def evaluate_held_out(self, microbatches: Iterator[Rows], device: torch.device) -> torch.Tensor:
        """As `Objective.evaluate_held_out`; the cross-entropy is the mean per held-out token."""
        total = torch.zeros(1 + len(self.measures), 2, dtype=torch.float64, device=device)
        imitated = torch.zeros(2, dtype=torch.float64, device=device)
        for rows in microbatches:
            batch = self.with_reference(self.collate(rows).to(device), "eval")
            compared = self.compare(self.model, batch)
            total[0] += compared.losses.new_tensor(
                [compared.losses.sum(), batch.loss_units]
            ).double()
            total[1:] += preference_measures(compared)
            imitated += imitated.new_tensor([compared.imitation, _imitated(batch)])
        if self._imitation_weight > 0:
            counts = torch.stack([total[0, 1], imitated[1]])
            pairs, tokens = self._sum_over_workers(counts).unbind()
            total[0, 0] += self._imitation_weight * imitated[0] * pairs / tokens.clamp(min=1)
        return total

    def answers(self, model: torch.nn.Module, batch: Batch) -> Answers:
        """The batch's answers under a model."""
        return answers_of(self.log_probabilities(model, batch), batch)

    def _sum_over_workers(self, sums: torch.Tensor) -> torch.Tensor:
        """Add the tensors of all workers in place, and return the sum."""
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums


def answers_of(log_probabilities: torch.Tensor, batch: Batch) -> Answers:
    """Answers of a batch, without padding rows.

    Args:
        log_probabilities: of each target, (sequences, columns), 0 where none is trained.
        batch: pairs as `collate_pairs` makes them.
    """
    totals = log_probabilities.sum(1).chunk(2)
    tokens = (batch.targets != IGNORED).sum(1).float().chunk(2)
    pairs = batch.loss_units
    return Answers(*(half[:pairs] for half in (*totals, *tokens)))


@torch.no_grad()
def preference_measures(compared: Comparison) -> torch.Tensor:
    """Sums and counts of accuracy, reward margin, chosen reward and rejected reward.

    Accuracy is 1 if the chosen answer's reward is higher, the margin is the difference.

    Returns:
        (4, 2) in float64, in the order of `PairSettings.measures`.
    """
    chosen, rejected = compared.chosen_rewards, compared.rejected_rewards
    accuracy = (chosen > rejected).to(chosen.dtype)
    sums = torch.stack([accuracy, chosen - rejected, chosen, rejected]).double().sum(1)
    return torch.stack([sums, torch.full_like(sums, len(chosen))], dim=1)


def smoothed_sigmoid_loss(logits: torch.Tensor, wrong: float) -> torch.Tensor:
    """-log sigmoid(logits) with label smoothing: a share `wrong` of the labels is wrong."""
    return -(1 - wrong) * logsigmoid(logits) - wrong * logsigmoid(-logits)


def _imitated(batch: Batch) -> int:
    """Number of trained tokens in the chosen texts."""
    chosen = batch.targets.chunk(2)[0]
    return int(np.count_nonzero(chosen.numpy(force=True) != IGNORED))
