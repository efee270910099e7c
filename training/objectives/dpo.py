"""Direct preference optimisation, with its family of losses."""

from dataclasses import replace
from typing import cast

import torch

from ..config.methods import DpoMethod
from ..data.batching import Batch
from .dpo_losses import PAIR_LOSSES, Pairs
from .objective import Setup
from .precomputed import PrecomputedReference
from .preference import Answers, Comparison, PairObjective, Split
from .references import Reference


class ReferencedPairObjective(PairObjective):
    """A loss on pairs that also uses a reference model's log-probabilities."""

    def __init__(
        self, setup: Setup, imitation_weight: float = 0.0, precomputes: bool = False
    ) -> None:
        """
        Args:
            setup: the run's setup; its method has the setting `reference_model`.
            imitation_weight: weight of the chosen answers' cross-entropy.
            precomputes: True to compute the reference for all rows now, not at each step.
        """
        super().__init__(setup, imitation_weight)
        name = setup.recipe.method.reference_name
        self._reference: Reference | None = None
        self._precomputed: PrecomputedReference | None = None
        if precomputes:
            self._precomputed = PrecomputedReference.load_or_compute(
                *(setup, name, self.division), self.collate, self._sums
            )
        else:
            self._reference = Reference(setup, name)

    def with_reference(self, batch: Batch, split: Split) -> Batch:
        """Add `extra["reference"]`: log-probabilities of the chosen, then the rejected answers."""
        if self._precomputed is not None:
            return batch.having(reference=self._precomputed.of_batch(batch, split))
        assert self._reference is not None
        return batch.having(reference=self._reference(self._sums, batch))

    def both_answers(self, model: torch.nn.Module, batch: Batch) -> tuple[Answers, Answers]:
        """The batch's answers under the model, then under the reference."""
        policy = self.answers(model, batch)
        chosen, rejected = batch.extra["reference"].chunk(2)
        return policy, replace(policy, chosen=chosen, rejected=rejected)

    def _sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        answers = self.answers(model, batch)
        return torch.cat([answers.chosen, answers.rejected])


class DpoObjective(ReferencedPairObjective):
    """DPO: losses of each pair relative to the reference."""

    def __init__(self, setup: Setup) -> None:
        self._settings = cast(DpoMethod, setup.recipe.method)
        super().__init__(
            setup,
            imitation_weight=self._settings.losses.get("sft", 0.0),
            precomputes=self._settings.precompute_reference,
        )

    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """The weighted sum of the losses; the implied reward is beta times the log-ratio."""
        settings = self._settings
        policy, reference = self.both_answers(model, batch)
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
        return Comparison(
            losses, beta * pairs.chosen_ratios, beta * pairs.rejected_ratios, -policy.chosen.sum()
        )
