"""Reward models: finray's own, and any sequence classifier."""

from typing import Any

import torch
from transformers import AutoTokenizer

from ...common.errors import InputError
from ...common.storage import Folder
from ...config.rewards import ModelReward, RunReward
from ...models.open_result import open_model, open_result
from ...records.run_folder import finished_run
from .reward import Completions, RewardValues, Turns

_BATCH = 16


class ClassifierReward:
    """A sequence classifier, one of whose logits is the reward.

    It reads prompt and completion together: a conversation through its tokenizer's chat template,
    plain text as it is, with an end-of-sequence token behind it.

    Args:
        name: in the names of metrics.
        weight: the reward counts so many times.
        model: put on the device where it works.
        tokenizer: the model's own.
        column: the logit.
    """

    def __init__(self, name: str, weight: float, model: Any, tokenizer: Any, column: int) -> None:
        self.name = name
        self.weight = weight
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._column = column

    @torch.no_grad()
    def score(self, completions: Completions) -> RewardValues:
        """The logit of each completion, in batches of texts of similar length."""
        pairs = zip(completions.prompts, completions.completions, strict=True)
        texts = [self._ids(prompt, completion) for prompt, completion in pairs]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        values: list[float | None] = [None] * len(texts)
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            scores = self._scores([texts[index] for index in chosen])
            for index, score in zip(chosen, scores, strict=True):
                values[index] = score
        return RewardValues(values)

    def _ids(self, prompt: Turns, completion: Turns) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(prompt, list) and isinstance(completion, list):
            if tokenizer.chat_template is None:
                raise InputError(
                    f"method.rewards: the tokenizer of {self.name} has no chat template, which "
                    "conversations need; give prompts as text, or another classifier"
                )
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        ids = tokenizer(f"{prompt}{completion}")["input_ids"]
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _scores(self, texts: list[list[int]]) -> list[float]:
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self._model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = next(self._model.parameters()).device
        logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        scores: list[float] = logits[:, self._column].float().tolist()
        return scores


def load_run(
    reward: RunReward, tokenizer: Any, dtype: torch.dtype, device: Any
) -> ClassifierReward:
    """The reward model of a finished finray run.

    Args:
        reward: the run.
        tokenizer: the policy's, which the reward model must share.
        dtype: of its weights.
        device: where it works.

    Raises:
        InputError: it has another tokenizer.
    """
    where = "method.rewards"
    opened = open_result(finished_run(Folder(reward.run)), "score", dtype, where)
    own = opened.tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{where}: {reward.run}: a reward model of another tokenizer")
    return _classifier_reward(reward.name, reward.weight, opened.model.to(device), own, 0)


def load_classifier(reward: ModelReward, dtype: torch.dtype, device: Any) -> ClassifierReward:
    """Any sequence classifier.

    Raises:
        InputError: it cannot be loaded, or has several labels of which none is named.
    """
    where = "method.rewards"
    model = open_model(reward.model, "score", dtype, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(reward.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot load {reward.model}: {error}") from None
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    column = label_index(reward, labels)
    return _classifier_reward(reward.name, reward.weight, model.to(device), tokenizer, column)


def _classifier_reward(
    name: str, weight: float, model: Any, tokenizer: Any, column: int
) -> ClassifierReward:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # The classifier finds a text's last token by what pads it.
    model.config.pad_token_id = pad
    return ClassifierReward(name, weight, model, tokenizer, column)


def label_index(reward: ModelReward, labels: list[str]) -> int:
    """Which logit is the reward.

    Raises:
        InputError: the recipe names none of several, or one that is not there.
    """
    if reward.label is None and len(labels) == 1:
        return 0
    if reward.label not in labels:
        raise InputError(
            f"method.rewards: {reward.model}: label {reward.label!r} is none of its labels: "
            f"{', '.join(labels)}"
        )
    return labels.index(reward.label)
