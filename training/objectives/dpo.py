"""Direct preference optimisation.

Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, eq. 7.
"""

import torch
import torch.nn.functional as F

from ..data.batching import Batch, Rows, collate_pairs
from ..method_settings import DpoMethod
from .objective import Loss, Objective, Setup
from .preference import answer_log_probabilities, preference_measures


class DpoObjective(Objective):
    """The loss of each pair against the reference; its unit is a pair."""

    measures = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert isinstance(setup.recipe.method, DpoMethod)
        self._settings = setup.recipe.method

    def collate(self, rows: Rows) -> Batch:
        """Chosen answers, then rejected ones."""
        return collate_pairs(rows)

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """Sum of the pairs' losses."""
        with torch.no_grad(), self.model.disable_adapter():
            reference = answer_log_probabilities(self.kept_logits(self.model, batch), batch)
        policy = answer_log_probabilities(self.kept_logits(model, batch), batch)
        chosen, rejected = (self._settings.beta * (policy - reference)).chunk(2)
        weight = batch.extra["weight"]
        total = (-F.logsigmoid(chosen - rejected) * weight).sum()
        measures = preference_measures(chosen, rejected, weight) if measured else None
        return Loss(total, measures)
