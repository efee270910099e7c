"""Preference losses without a reference: CPO and SimPO."""

from typing import cast

import torch

from ..config.methods import CpoMethod, SimpoMethod
from ..data.batching import Batch
from .objective import Setup
from .preference import Comparison, PairObjective, smoothed_sigmoid_loss


class CpoObjective(PairObjective):
    """A loss on the difference between both answers' log-probabilities.

    Xu et al., 2024, https://arxiv.org/abs/2401.08417, eq. 3 and 5. The loss ipo uses their means
    per token.
    """

    def __init__(self, setup: Setup) -> None:
        self._settings = cast(CpoMethod, setup.recipe.method)
        super().__init__(setup, imitation_weight=self._settings.sft_weight)

    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """The implied reward is beta times the log-probability (for ipo: per token)."""
        answers = self.answers(model, batch)
        imitation = -answers.chosen.sum()
        if self._settings.loss == "ipo":
            answers = answers.means
        losses = cpo_loss(answers.chosen - answers.rejected, self._settings)
        beta = self._settings.beta
        return Comparison(losses, beta * answers.chosen, beta * answers.rejected, imitation)


class SimpoObjective(PairObjective):
    """A loss on the difference between both answers' log-probabilities per token.

    Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6.
    """

    def __init__(self, setup: Setup) -> None:
        self._settings = cast(SimpoMethod, setup.recipe.method)
        super().__init__(setup, imitation_weight=self._settings.sft_weight)

    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """The implied reward is beta times the log-probability per token."""
        answers = self.answers(model, batch)
        means = answers.means
        losses = simpo_loss(means.chosen - means.rejected, self._settings)
        beta = self._settings.beta
        return Comparison(losses, beta * means.chosen, beta * means.rejected, -answers.chosen.sum())


def cpo_loss(difference: torch.Tensor, settings: CpoMethod) -> torch.Tensor:
    """CPO's losses.

    Args:
        difference: log-probability of the chosen minus that of the rejected answer, (pairs,), in
            nats; for ipo per token.
        settings: loss, beta and label smoothing.

    Returns:
        (pairs,)
    """
    logits = settings.beta * difference
    match settings.loss:
        case "hinge":
            return torch.relu(1 - logits)
        case "ipo":
            return (difference - 1 / (2 * settings.beta)) ** 2
        case "sigmoid":
            return smoothed_sigmoid_loss(logits, settings.label_smoothing)


def simpo_loss(difference: torch.Tensor, settings: SimpoMethod) -> torch.Tensor:
    """SimPO's losses.

    Args:
        difference: log-probability of the chosen minus that of the rejected answer, (pairs,), in
            nats per token.
        settings: beta, gamma and label smoothing.

    Returns:
        (pairs,)
    """
    logits = settings.beta * difference - settings.gamma
    return smoothed_sigmoid_loss(logits, settings.label_smoothing)
