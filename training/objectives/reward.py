"""A Bradley-Terry reward model: the chosen text gets a higher score than the rejected one.

Stiennon et al., 2020, https://arxiv.org/abs/2009.01325, section 3.4. The margin is from Llama 2,
https://arxiv.org/abs/2307.09288, eq. 2; the centring is from Eisenstein et al., 2023,
https://arxiv.org/abs/2312.09244, appendix.
"""

import json
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid

from ..common.errors import InputError
from ..config.methods import RewardMethod
from ..data.batching import Batch, Rows, collate_pairs, texts_of
from ..models.devices import sum_type
from ..models.isolation import outputs_of
from ..models.loading import Model, forward_arguments
from .objective import Setup
from .preference import Comparison, PairObjective


class RewardObjective(PairObjective):
    """-log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)^2 of each pair."""

    def __init__(self, setup: Setup) -> None:
        self._head = _head_of(setup.model)
        super().__init__(setup if self._head is not None else replace(setup, isolation=None))
        self._centre = cast(RewardMethod, setup.recipe.method).center_coefficient
        pad = setup.model.config.get_text_config().pad_token_id
        if pad is None:
            raise InputError(
                f"model.base: the tokenizer of {setup.recipe.model.base} has neither a padding nor "
                "an end-of-sequence token, but a reward model needs one to find the end of a text; "
                "set pad_token in tokenizer_config.json"
            )
        self._pad: int = pad
        self._accepted = forward_arguments(setup.model)

    def collate(self, rows: Rows) -> Batch:
        """Pad rows with the model's padding token; `extra["margin"]` has shape (pairs,).

        `extra["ends"]`, (sequences,), is where each text of a flat row has its score: at its last
        token that is no padding token, as the model itself takes it.
        """
        margins = [_margin(row.extra) for row in rows if row.rows.size]
        batch = collate_pairs(rows, lambda texts: self.assemble(texts, self._pad))
        texts = [text.input_ids for text in texts_of(rows)]
        first = np.cumsum([0, *map(len, texts[:-1])])
        last = [np.flatnonzero(text != self._pad)[-1:].sum() for text in texts]
        ends = torch.from_numpy(first + last)
        if batch.documents is not None:
            ends = batch.documents.places(ends)
        margin = torch.tensor(margins, dtype=sum_type(self.device))
        return batch.having(margin=margin, ends=ends)

    def compare(self, model: torch.nn.Module, batch: Batch) -> Comparison:
        """Losses of the pairs; the reward is the model's score."""
        scores = self._scores(model, batch)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        chosen, rejected = (half[: batch.loss_units] for half in scores.chunk(2))
        margin = batch.extra["margin"].to(scores.dtype)
        losses = -logsigmoid(chosen - rejected - margin)
        if self._centre > 0:
            losses = losses + self._centre * (chosen + rejected) ** 2
        return Comparison(losses, chosen, rejected, imitation=losses.new_zeros(()))

    def _scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Score of each text, (sequences,)."""
        if batch.documents is None:
            inputs = batch.inputs["input_ids"]
            logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits
            return logits.squeeze(-1)
        assert self._head is not None

        def of_all_texts(_: torch.nn.Module, args: object, scores: torch.Tensor) -> torch.Tensor:
            # The model takes one of the row's tokens: each has all scores.
            ends = scores[:, batch.extra["ends"], 0]
            return ends[:, None].expand(-1, scores.shape[1], -1)

        handle = self._head.register_forward_hook(of_all_texts)
        try:
            outputs = outputs_of(model, batch, self._accepted, self._isolation)
        finally:
            handle.remove()
        return cast(torch.Tensor, outputs.logits)[0]


def _head_of(model: Model) -> torch.nn.Module | None:
    """The layer that scores each token; None if the model has none of this name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return dict(base.named_children()).get("score")


def _margin(extra: str | None) -> float:
    return 0.0 if extra is None else float(json.loads(extra)["margin"])
