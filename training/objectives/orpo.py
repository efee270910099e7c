"""Odds ratio preference optimisation: Hong et al., 2024, https://arxiv.org/abs/2403.07691."""

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from ..config.methods import OrpoMethod
from ..data.batching import Batch, Rows, collate_pairs
from ..data.stream import Sequence
from .objective import Setup
from .preference import Answers, Comparison, PairObjective


class OrpoObjective(PairObjective):
    """Cross-entropy of chosen texts with their prompts, and a loss on each pair's odds ratio."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, imitation_weight=1.0)
        self._beta = cast(OrpoMethod, setup.recipe.method).beta

    def collate(self, rows: Rows) -> Batch:
        """Pairs whose chosen texts are trained with their prompts.

        `extra["answer"]`, (sequences, columns), is True for the targets of answers.
        """
        trained = [_with_prompt(row) for row in rows]
        # The same batch with 1 in place of each token of an answer, and 0 of a prompt.
        marks = [
            replace(with_prompt, input_ids=row.trainable.astype(np.int32))
            for row, with_prompt in zip(rows, trained, strict=True)
        ]
        marked = collate_pairs(marks, self.assemble)
        return collate_pairs(trained, self.assemble).having(answer=marked.targets == 1)

    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """-beta log sigmoid(log odds ratio), eq. 7.

        The implied reward is beta times the log-probability per token.
        """
        of_tokens = self.log_probabilities(model, batch)
        is_answer = batch.extra["answer"]
        answers = self._means(of_tokens * is_answer, is_answer, batch.loss_units)
        losses = -self._beta * logsigmoid(log_odds_ratio(answers.chosen, answers.rejected))
        imitation = -of_tokens.chunk(2)[0].sum()
        return Comparison(
            losses, self._beta * answers.chosen, self._beta * answers.rejected, imitation
        )

    def _means(self, of_answers: torch.Tensor, is_answer: torch.Tensor, pairs: int) -> Answers:
        totals, tokens = of_answers.sum(1).chunk(2), is_answer.sum(1).float().chunk(2)
        return Answers(*(half[:pairs] for half in (*totals, *tokens))).means


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """log(odds(chosen) / odds(rejected)) of two log-probabilities; odds(p) = p / (1 - p)."""
    return (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))


def _log_complement(log_probability: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0: Mächler, 2012, "Accurately computing log(1 - exp(-|a|))"."""
    # torch.where needs finite gradients in both branches, also in the unused one.
    x = log_probability.clamp(max=-1e-7)
    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    return torch.where(x > -math.log(2), near, far)


def _with_prompt(pair: Sequence) -> Sequence:
    """The pair with all tokens of the chosen text trained."""
    if not pair.rows.size:
        return pair
    trainable = pair.trainable.copy()
    trainable[1 : pair.lengths[0]] = True
    return replace(pair, trainable=np.asarray(trainable))
