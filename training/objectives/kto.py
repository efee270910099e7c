"""Kahneman-Tversky optimisation: Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from ..config.methods import KtoMethod
from ..data.batching import PADDING_ROW, Batch, Rows
from ..data.stream import Sequence
from ..models.cpu_group import cpu_group
from ..models.loading import evaluation_mode
from .objective import Loss, Objective, Setup
from .references import Reference


class KtoObjective(Objective):
    """Compares each labelled answer with a baseline; the loss unit is an answer.

    The baseline is the divergence from the reference, estimated on mismatched answers: each prompt
    of the global batch with the answer of the previous row. It has no gradient.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._settings = cast(KtoMethod, setup.recipe.method)
        self._rank = setup.rank
        self._max_length = setup.recipe.data.max_length
        self._reference = Reference(setup, self._settings.reference_model)
        # The CPUs exchange the rows, so that a GPU never waits for them.
        self._hosts = cpu_group() if setup.world_size > 1 else None

    def collate(self, rows: Rows) -> Batch:
        """Add the labels as `extra["desirable"]`, (answers,), without padding rows."""
        labels = [json.loads(row.extra)["label"] for row in rows if row.extra is not None]
        batch = replace(self.assemble(rows), loss_units=len(labels))
        return batch.having(desirable=torch.tensor(labels, dtype=torch.bool))

    def batches(self, step: int, rows: Rows) -> list[Batch]:
        """Add the reference's log-probabilities and the baseline of the global batch."""
        baseline = torch.zeros((), device=self.device)
        if self._settings.loss == "kto":
            last = self._last_row_of_previous_rank(rows[-1])
            mismatched = _mismatched(rows, last, self._max_length)
            ratios = [
                self._divergences([mismatched[place] for place in part])
                for part in self.parts(mismatched)
            ]
            baseline = self._mean(torch.cat(ratios))
        return [
            batch.having(reference=self._reference(self._sums, batch), baseline=baseline)
            for batch in super().batches(step, rows)
        ]

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Sum of the answers' losses."""
        ratios = self._sums(model, batch) - batch.extra["reference"]
        desirable, baseline = batch.extra["desirable"], batch.extra["baseline"]
        total = answer_losses(ratios, desirable, baseline, self._settings).sum()
        return Loss(total, self._measure(ratios, desirable, baseline) if measured else None)

    def evaluate_held_out(self, microbatches: Iterator[Rows], device: torch.device) -> torch.Tensor:
        """As `Objective.evaluate_held_out`, with one baseline for all held-out rows."""
        ratios = [torch.zeros(0, device=device)]
        labels = [torch.zeros(0, dtype=torch.bool, device=device)]
        divergences = [torch.zeros(0, device=device)]
        last: dict[bool, Sequence] = {}  # on each side of the border
        for rows in microbatches:
            batch = self.collate(rows).to(device)
            ratios.append(self._sums(self.model, batch) - self._reference(self._sums, batch))
            labels.append(batch.extra["desirable"])
            if self._settings.loss == "kto":
                real = [row for row in rows if row.rows.size]
                before: Rows = []
                if real:
                    side = self.division.passes_border(real[0])
                    later = real if side in last else real[1:]
                    if later:
                        before = _mismatched(later, last.get(side, real[0]), self._max_length)
                    last[side] = real[-1]
                divergences += [self._divergences(part) for part in self.division.sides(before)]
        baseline = self._mean(torch.cat(divergences))
        ratio, desirable = torch.cat(ratios), torch.cat(labels)
        losses = answer_losses(ratio, desirable, baseline, self._settings).double()
        total = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        return torch.cat([total[None], self._measure(ratio, desirable, baseline)])

    def _sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probabilities of the answers in nats, (answers,)."""
        return self.log_probabilities(model, batch).sum(1)[: batch.loss_units]

    def _last_row_of_previous_rank(self, own: Sequence) -> Sequence:
        """The row that precedes this worker's first row in the (cyclic) global batch."""
        if self.world_size == 1:
            return own
        lasts: list[Sequence] = [own] * self.world_size
        dist.all_gather_object(lasts, own, group=self._hosts)
        return lasts[self._rank - 1]

    @torch.no_grad()
    def _divergences(self, rows: Rows) -> torch.Tensor:
        """log policy - log reference of the rows' answers, (rows,)."""
        # Also without rows: all ranks must call a sharded model together.
        batch = self.assemble(rows or [PADDING_ROW])
        batch = replace(batch, loss_units=len(rows)).to(self.device)
        with evaluation_mode(self.model):
            policy = self._sums(self.model, batch)
        return policy - self._reference(self._sums, batch)

    def _mean(self, divergences: torch.Tensor) -> torch.Tensor:
        """The mean over all workers; at least 0, because a divergence is not negative."""
        count = torch.full((), len(divergences), dtype=torch.float64, device=self.device)
        sums = torch.stack([divergences.double().sum(), count])
        if self.world_size > 1:
            dist.all_reduce(sums)
        return (sums[0] / sums[1].clamp(min=1)).clamp(min=0)

    @torch.no_grad()
    def _measure(
        self, ratios: torch.Tensor, desirable: torch.Tensor, baseline: torch.Tensor
    ) -> torch.Tensor:
        """Sums and counts of the rewards of desirable and undesirable answers, and the baseline."""
        rewards = self._settings.beta * ratios.double()
        count = float(len(ratios)) if self._settings.loss == "kto" else 0.0
        rows = [
            # A mask as an index would make the host wait for its number of values.
            torch.stack([torch.where(mask, rewards, 0.0).sum(), mask.sum().double()])
            for mask in (desirable, ~desirable)
        ]
        of_baseline = baseline.double()
        return torch.stack(
            [*rows, torch.stack([of_baseline * count, torch.full_like(of_baseline, count)])]
        )


def answer_losses(
    ratios: torch.Tensor, desirable: torch.Tensor, baseline: torch.Tensor, settings: KtoMethod
) -> torch.Tensor:
    """Losses of answers, (answers,).

    1 - sigmoid(beta (ratio - baseline)) for desirable answers, and with the opposite sign for
    undesirable ones: eq. 7. apo_zero uses no baseline: D'Oosterlinck et al., 2024,
    https://arxiv.org/abs/2408.06266, eq. 7.

    Args:
        ratios: log policy(y) - log reference(y), (answers,).
        desirable: True for a desirable answer, (answers,).
        baseline: a scalar, in nats.
        settings: beta and weights.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    losses = 1 - torch.sigmoid(settings.beta * (sign * (ratios - baseline)))
    good, bad = settings.desirable_weight * losses, settings.undesirable_weight * losses
    return torch.where(desirable, good, bad)


def _mismatched(rows: Rows, last: Sequence, max_length: int) -> Rows:
    """Each row's prompt with the answer of the previous row; `last` precedes the first row."""
    return [
        _join(row, previous, max_length)
        for row, previous in zip(rows, [last, *rows[:-1]], strict=True)
    ]


def _join(row: Sequence, previous: Sequence, max_length: int) -> Sequence:
    start, end = _answer_start(row), _answer_start(previous)
    input_ids = np.concatenate([row.input_ids[:start], previous.input_ids[end:]])[:max_length]
    trainable = np.concatenate([row.trainable[:start], previous.trainable[end:]])[:max_length]
    return Sequence(input_ids, np.array([len(input_ids)], np.int32), trainable, row.rows)


def _answer_start(row: Sequence) -> int:
    return int(np.argmax(row.trainable))
