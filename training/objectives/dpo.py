"""Direct preference optimisation, with its family of losses."""

from dataclasses import replace
from typing import cast

import torch

from ..config.methods import DpoMethod
from ..data.batching import Batch
from .dpo_losses import PAIR_LOSSES, Pairs
from .objective import Setup
from .precomputed import PrecomputedReference
from .preference import Compared, PairObjective, Split
from .references import Reference


class DpoObjective(PairObjective):
    """Losses of each pair against the reference."""

    def __init__(self, setup: Setup) -> None:
        settings = cast(DpoMethod, setup.recipe.method)
        super().__init__(setup, imitation_weight=settings.losses.get("sft", 0.0))
        self._settings = settings
        self._reference: Reference | None = None
        self._precomputed: PrecomputedReference | None = None
        if settings.precompute_reference:
            self._precomputed = PrecomputedReference.of(
                setup, settings.reference_model, self.collate, self._sums
            )
        else:
            self._reference = Reference(setup, settings.reference_model)

    def with_reference(self, batch: Batch, split: Split) -> Batch:
        """With `extra["reference"]`: log-probabilities of the chosen, then the rejected ones."""
        if self._precomputed is not None:
            return batch.having(reference=self._precomputed.of_batch(batch, split))
        assert self._reference is not None
        return batch.having(reference=self._reference(self._sums, batch))

    def compare(self, model: torch.nn.Module, batch: Batch) -> Compared:
        """The weighted sum of the losses; a reward is beta times the log-ratio."""
        settings = self._settings
        policy = self.answers(model, batch)
        chosen, rejected = batch.extra["reference"].chunk(2)
        reference = replace(policy, chosen=chosen, rejected=rejected)
        pairs = Pairs.of(policy, reference, settings)
        losses = sum(
            (
                weight * PAIR_LOSSES[name](pairs, settings)
                for name, weight in settings.losses.items()
                if name != "sft"
            ),
            start=torch.zeros_like(policy.chosen),
        )
        beta = settings.beta
        return Compared(
            losses, beta * pairs.chosen_ratios, beta * pairs.rejected_ratios, -policy.chosen.sum()
        )

    def _sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        answers = self.answers(model, batch)
        return torch.cat([answers.chosen, answers.rejected])
