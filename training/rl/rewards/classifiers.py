"""Rewards from models: finray's own reward models, and any sequence classifier."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoTokenizer

from ...common.errors import InputError
from ...common.storage import Folder
from ...config.model_folder import named_model
from ...config.rewards import ModelReward, RunReward
from ...data.chat import ChatTemplate, chat_template_of
from ...data.fields import context_of
from ...data.shapes import NO_CONTEXT, ChatContext
from ...models.open_result import open_model, open_result
from ...models.out_of_memory import in_fitting_parts
from ...models.pretrained import not_loaded
from ...models.rotary import length_border, on_either_side
from ...records.run_folder import finished_run
from .reward import Completions, RewardValues, Turns

_BATCH = 16
_REMEDY = "a smaller method.max_completion, or a smaller reward model, takes less"


@dataclass
class Classifier:
    """One logit of a sequence classifier as the score of a text.

    It reads prompt and completion together: a conversation through its tokenizer's chat template,
    plain text unchanged with an end-of-sequence token at the end.
    """

    model: Any
    """On the device where it computes."""
    tokenizer: Any
    """The classifier's own tokenizer."""
    column: int
    """Index of the logit."""
    where: str
    """The key in the recipe, for messages."""
    remedy: str
    """What takes less memory, for messages."""
    _at_once: int = _BATCH

    @property
    def longest(self) -> int:
        """Tokens that it has positions for."""
        return int(self.model.config.to_dict().get("max_position_embeddings") or sys.maxsize)

    @torch.no_grad()
    def scores(self, texts: Sequence[list[int]]) -> list[float]:
        """The logit of each text, in batches of texts of similar length."""

        def size(index: int) -> int:
            return len(texts[index])

        of_text: dict[int, float] = {}
        border = length_border(self.model.config)
        for side in on_either_side(sorted(range(len(texts)), key=size), border, size):
            scores, self._at_once = in_fitting_parts(
                *([texts[index] for index in side], self._at_once, self._scores),
                what="texts to score",
                remedy=self.remedy,
            )
            of_text |= zip(side, scores, strict=True)
        return [of_text[index] for index in range(len(texts))]

    @cached_property
    def _template(self) -> ChatTemplate:
        return chat_template_of(self.tokenizer, None)

    def ids(self, prompt: Turns, completion: Turns, context: ChatContext = NO_CONTEXT) -> list[int]:
        """The token ids of a prompt and its completion.

        Raises:
            InputError: they are messages, and the tokenizer has no chat template.
        """
        tokenizer = self.tokenizer
        if isinstance(prompt, list) and isinstance(completion, list):
            if tokenizer.chat_template is None:
                raise InputError(
                    f"{self.where}: the tokenizer of the reward model has no chat template, but "
                    "the prompts are conversations; give prompts as text, or use another classifier"
                )
            text = self._template.render([*prompt, *completion], context=context)
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        ids = tokenizer(f"{prompt}{completion}")["input_ids"]
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]  # the prompt holds it already
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _scores(self, texts: Sequence[list[int]]) -> list[float]:
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self.model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        scores: list[float] = logits[:, self.column].float().tolist()
        return scores


class ClassifierReward:
    """Uses one logit of a sequence classifier as the reward.

    Args:
        name: the reward's name in metrics.
        weight: the reward's weight in the sum of rewards.
        classifier: what scores texts.
    """

    def __init__(self, name: str, weight: float, classifier: Classifier) -> None:
        self.name = name
        self.weight = weight
        self.classifier = classifier

    def score(self, completions: Completions) -> RewardValues:
        """The logit of each completion."""
        texts = [
            self.classifier.ids(
                completions.prompts[index],
                completions.completions[index],
                context_of({name: values[index] for name, values in completions.columns.items()}),
            )
            for index in range(len(completions))
        ]
        return RewardValues([*self.classifier.scores(texts)])


def load_run(
    reward: RunReward, tokenizer: Any, dtype: torch.dtype, device: Any
) -> ClassifierReward:
    """The reward model of a finished finray run.

    Args:
        reward: the run.
        tokenizer: the policy's tokenizer, which must be the reward model's too.
        dtype: type of the reward model's weights.
        device: the device that the reward model computes on.

    Raises:
        InputError: the reward model cannot be loaded, or has another tokenizer.
    """
    where = "method.rewards"
    opened = open_result(finished_run(Folder(reward.run)), "score", dtype, where)
    own = opened.tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{where}: the reward model of {reward.run} has another tokenizer than the policy; "
            "train both from the same base"
        )
    classifier = classifier_of(opened.model.to(device), own, where, _REMEDY)
    return ClassifierReward(reward.name, reward.weight, classifier)


def load_classifier(reward: ModelReward, dtype: torch.dtype, device: Any) -> ClassifierReward:
    """A reward from any sequence classifier.

    Raises:
        InputError: the classifier cannot be loaded, or does not have the recipe's label.
    """
    where = "method.rewards"
    model = open_model(reward.model, "score", dtype, where)
    try:
        named = named_model(reward.model)
        tokenizer = AutoTokenizer.from_pretrained(
            named.base, revision=named.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise not_loaded(where, reward.model, error) from None
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    column = label_index(reward, labels)
    classifier = classifier_of(model.to(device), tokenizer, where, _REMEDY, column)
    return ClassifierReward(reward.name, reward.weight, classifier)


def classifier_of(
    model: Any, tokenizer: Any, where: str, remedy: str, column: int = 0
) -> Classifier:
    """A sequence classifier, ready to score; arguments as the fields of `Classifier`."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # The classifier uses its padding token to find the last token of a text.
    model.config.pad_token_id = pad
    return Classifier(model.eval().requires_grad_(False), tokenizer, column, where, remedy)


def label_index(reward: ModelReward, labels: list[str]) -> int:
    """Index of the logit that is the reward.

    Raises:
        InputError: the recipe names no label though there are several, or an unknown label.
    """
    if reward.label is None and len(labels) == 1:
        return 0
    if reward.label not in labels:
        raise InputError(
            f"method.rewards: {reward.model} has no label {reward.label!r}; its labels are "
            f"{', '.join(labels)}"
        )
    return labels.index(reward.label)
