"""Preference losses without a reference: CPO and SimPO."""

from typing import cast

import torch
from torch.nn.functional import logsigmoid

from ..config.methods import CpoMethod, SimpoMethod
from ..data.batching import Batch
from .objective import Setup
from .preference import Compared, PairObjective


class CpoObjective(PairObjective):
    """A loss of the difference between both answers' log-probabilities.

    Xu et al., 2024, https://arxiv.org/abs/2401.08417, eq. 3 and 5. Loss ipo takes their means per
    token.
    """

    def __init__(self, setup: Setup) -> None:
        self._settings = cast(CpoMethod, setup.recipe.method)
        super().__init__(setup, imitation_weight=self._settings.sft_weight)

    def compare(self, model: torch.nn.Module, batch: Batch) -> Compared:
        """A reward is beta times the log-probability, per token for ipo."""
        answers = self.answers(model, batch)
        imitation = -answers.chosen.sum()
        if self._settings.loss == "ipo":
            answers = answers.means
        losses = cpo_loss(answers.chosen - answers.rejected, self._settings)
        beta = self._settings.beta
        return Compared(losses, beta * answers.chosen, beta * answers.rejected, imitation)


class SimpoObjective(PairObjective):
    """A loss of the difference between both answers' log-probabilities per token.

    Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6.
    """

    def __init__(self, setup: Setup) -> None:
        self._settings = cast(SimpoMethod, setup.recipe.method)
        super().__init__(setup, imitation_weight=self._settings.sft_weight)

    def compare(self, model: torch.nn.Module, batch: Batch) -> Compared:
        """A reward is beta times the log-probability per token."""
        answers = self.answers(model, batch)
        means = answers.means
        losses = simpo_loss(means.chosen - means.rejected, self._settings)
        beta = self._settings.beta
        return Compared(losses, beta * means.chosen, beta * means.rejected, -answers.chosen.sum())


def cpo_loss(difference: torch.Tensor, settings: CpoMethod) -> torch.Tensor:
    """Losses, (pairs,), by the chosen answer's lead in log-probability, (pairs,), in nats."""
    logits = settings.beta * difference
    match settings.loss:
        case "hinge":
            return torch.relu(1 - logits)
        case "ipo":
            return (difference - 1 / (2 * settings.beta)) ** 2
        case "sigmoid":
            return _smoothed_sigmoid(logits, settings.label_smoothing)


def simpo_loss(difference: torch.Tensor, settings: SimpoMethod) -> torch.Tensor:
    """Losses, (pairs,), by the chosen answer's lead in nats per token, (pairs,)."""
    logits = settings.beta * difference - settings.gamma
    return _smoothed_sigmoid(logits, settings.label_smoothing)


def _smoothed_sigmoid(logits: torch.Tensor, wrong: float) -> torch.Tensor:
    """-log sigmoid, where a share `wrong` of the pairs has the wrong label."""
    return -(1 - wrong) * logsigmoid(logits) - wrong * logsigmoid(-logits)
