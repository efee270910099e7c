"""A Bradley-Terry reward model: the chosen text gets a higher score than the rejected one.

Stiennon et al., 2020, https://arxiv.org/abs/2009.01325, section 3.4. The margin is from Llama 2,
https://arxiv.org/abs/2307.09288, eq. 2; the centring is from Eisenstein et al., 2023,
https://arxiv.org/abs/2312.09244, appendix.
"""

import json
from typing import cast

import torch
from torch.nn.functional import logsigmoid

from ..common.errors import InputError
from ..config.methods import RewardMethod
from ..data.batching import Batch, Rows, collate_pairs
from .objective import Setup
from .preference import Comparison, PairObjective


class RewardObjective(PairObjective):
    """-log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)^2 of each pair."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._centre = cast(RewardMethod, setup.recipe.method).center_coefficient
        pad = setup.model.config.get_text_config().pad_token_id
        if pad is None:
            raise InputError(
                f"model.base: the tokenizer of {setup.recipe.model.base} has neither a padding nor "
                "an end-of-sequence token, but a reward model needs one to find the end of a text; "
                "set pad_token in tokenizer_config.json"
            )
        self._pad: int = pad

    def collate(self, rows: Rows) -> Batch:
        """Pad rows with the model's padding token; `extra["margin"]` has shape (pairs,)."""
        margins = [_margin(row.extra) for row in rows if row.rows.size]
        return collate_pairs(rows, self._pad).having(margin=torch.tensor(margins))

    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """Losses of the pairs; the reward is the model's score."""
        inputs = batch.inputs["input_ids"]
        scores = model(input_ids=inputs, use_cache=False).logits.squeeze(-1).float()
        chosen, rejected = (half[: batch.loss_units] for half in scores.chunk(2))
        losses = -logsigmoid(chosen - rejected - batch.extra["margin"])
        if self._centre > 0:
            losses = losses + self._centre * (chosen + rejected) ** 2
        return Comparison(losses, chosen, rejected, imitation=losses.new_zeros(()))


def _margin(extra: str | None) -> float:
    return 0.0 if extra is None else float(json.loads(extra)["margin"])
