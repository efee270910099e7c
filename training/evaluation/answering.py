"""Answers prompts in batches: which prompts share one is decided by the rows alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import LogitsProcessorList

from ..data.rendering import Prompt
from ..data.shapes import RowError
from ..models.generation import Generated, completion_texts, generate_ids
from ..models.out_of_memory import in_fitting_parts
from ..rl.rollouts.sampling import Sampler
from .answer_settings import AnswerSettings
from .opened import Opened
from .prompts import PromptRow

_WINDOW = 32
"""Batches among which prompts are sorted by their length."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Ask:
    """A prompt in tokens."""

    row: PromptRow
    prompt: Prompt
    room: int
    """Most tokens of its answer."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to a row."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, with the one that ended it."""
    ended: bool
    """False if it was cut off at the most tokens."""


def ask_of(opened: Opened, row: PromptRow, settings: AnswerSettings) -> Ask | PromptRow:
    """A row's prompt in tokens; the row with its error if the model cannot read it."""
    if row.question is None:
        return row
    try:
        prompt = opened.renderer.question(row.question)
    except RowError as error:
        return _refused(row, str(error))
    size = len(prompt.input_ids)
    if not size:
        return _refused(row, "the prompt has no token; give it a text")
    room = min(settings.max_tokens, opened.context - size)
    if room < 1:
        return _refused(
            row, f"the prompt's {size:,} tokens fill the model's context of {opened.context:,}"
        )
    return Ask(row, prompt, room)


def _refused(row: PromptRow, reason: str) -> PromptRow:
    return replace(row, question=None, error=f"{row.place}: {reason}")


def batches(
    opened: Opened, rows: Iterable[PromptRow], settings: AnswerSettings
) -> Iterator[list[Ask] | PromptRow]:
    """Batches of prompts, and between them the rows that are no prompts.

    Prompts of similar length share a batch. One that leaves less than `max_tokens` of the model's
    context is alone.
    """
    for window in windows(rows, settings.at_once * _WINDOW):
        asked = [ask_of(opened, row, settings) for row in window]
        yield from (row for row in asked if isinstance(row, PromptRow))
        asks = [ask for ask in asked if isinstance(ask, Ask)]
        asks.sort(key=lambda ask: len(ask.prompt.input_ids))
        roomy = [ask for ask in asks if ask.room == settings.max_tokens]
        for first in range(0, len(roomy), settings.at_once):
            yield roomy[first : first + settings.at_once]
        yield from ([ask] for ask in asks if ask.room < settings.max_tokens)


def windows(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """The items in lists of a size, but for the last."""
    waiting = iter(items)
    while window := list(islice(waiting, size)):
        yield window


def answer(opened: Opened, batch: Sequence[Ask], settings: AnswerSettings) -> list[Answer]:
    """The answers to a batch of prompts, in its order.

    Raises:
        RunError: a single answer does not fit into memory.
    """
    answers, _ = in_fitting_parts(
        *(batch, len(batch), lambda part: _answer(opened, part, settings)),
        what="answers",
        remedy="a smaller --max-tokens takes less",
    )
    return answers


def _answer(opened: Opened, batch: Sequence[Ask], settings: AnswerSettings) -> list[Answer]:
    prompts = [ask.prompt.input_ids.tolist() for ask in batch]
    room = min(ask.room for ask in batch)
    how: dict[str, Any] = {}
    if settings.temperature > 0:
        numbers = [(settings.seed, ask.row.number) for ask in batch]
        uniform = np.stack([np.random.default_rng(pair).random(room) for pair in numbers])
        drawn = torch.from_numpy(uniform).to(opened.device)
        longest = max(map(len, prompts))
        how["logits_processor"] = LogitsProcessorList([Sampler(settings, drawn, longest)])
    with opened.active():
        generated = generate_ids(opened.model, opened.tokenizer, prompts, room, opened.stops, **how)
    return answers_of(opened, batch, generated)


def answers_of(
    opened: Opened, batch: Sequence[Ask], completions: Sequence[Generated]
) -> list[Answer]:
    """Completions of a batch as answers, in its order."""
    texts = completion_texts(opened.tokenizer, completions)
    return [
        Answer(text.removeprefix(ask.prompt.cut), tuple(one.ids), one.ended)
        for ask, text, one in zip(batch, texts, completions, strict=True)
    ]
