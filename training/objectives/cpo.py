"""Preference losses without a reference: CPO and SimPO."""

import torch
from torch.nn.functional import logsigmoid

from ..config.methods import CpoMethod, SimpoMethod
from ..data.batching import Batch
from .objective import Setup
from .preference import Compared, PairObjective


class CpoObjective(PairObjective):
    """A loss of the difference between both answers' log-probabilities.

    CPO: Xu et al., 2024, https://arxiv.org/abs/2401.08417, eq. 3 and 5; SimPO: Meng et al., 2024,
    https://arxiv.org/abs/2405.14734, eq. 6.
    """

    def __init__(self, setup: Setup) -> None:
        settings = setup.recipe.method
        assert isinstance(settings, CpoMethod | SimpoMethod)
        super().__init__(setup, imitation_weight=settings.sft_weight)
        self._settings = settings

    def compare(self, model: torch.nn.Module, batch: Batch) -> Compared:
        """A reward is beta times the log-probability, per token for ipo and SimPO."""
        settings = self._settings
        answers = self.answers(model, batch)
        imitation = -answers.chosen.sum()
        if isinstance(settings, SimpoMethod) or settings.loss == "ipo":
            answers = answers.means
        losses = reference_free_loss(answers.chosen - answers.rejected, settings)
        beta = settings.beta
        return Compared(losses, beta * answers.chosen, beta * answers.rejected, imitation)


def reference_free_loss(
    difference: torch.Tensor, settings: CpoMethod | SimpoMethod
) -> torch.Tensor:
    """The pairs' losses, (pairs,), of how far the chosen answer leads, in nats."""
    logits, wrong = settings.beta * difference, settings.label_smoothing
    if isinstance(settings, SimpoMethod):
        logits = logits - settings.gamma
    elif settings.loss == "hinge":
        return torch.relu(1 - logits)
    elif settings.loss == "ipo":
        return (difference - 1 / (2 * settings.beta)) ** 2
    return -(1 - wrong) * logsigmoid(logits) - wrong * logsigmoid(-logits)
