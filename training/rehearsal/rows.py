"""Rows of a method's shape with made-up tokens: a rehearsal needs no data."""

import json

import numpy as np
from numpy.typing import NDArray

from ..config.method_facts import MethodSettings
from ..data.batching import Rows
from ..data.stream import Sequence

FIRST_TOKEN = 4
"""Tokens below it mean something to the tokenizer of the copy."""


def rows_for(
    method: MethodSettings, count: int, vocabulary: int, longest: int, packed: bool
) -> Rows:
    """Rows of a step.

    Args:
        method: the settings of the method, which tell what a row is.
        count: number of rows.
        vocabulary: rows of the embedding.
        longest: tokens of the longest document or answer.
        packed: True for several documents in a row.
    """
    random = np.random.default_rng(0)
    lengths = [longest, max(6, longest // 2), max(8, longest - 3)]
    texts = len(lengths) if packed else method.sequences_per_row
    rows = []
    for number in range(count):
        own = [lengths[(number + text) % len(lengths)] for text in range(texts)]
        rows.append(_row(own, number, random, vocabulary, _extra(method, number), packed))
    return rows


def _row(
    lengths: list[int],
    number: int,
    random: np.random.Generator,
    vocabulary: int,
    extra: str | None,
    packed: bool,
) -> Sequence:
    """A row; the first tokens of every text are its prompt, which is not trained."""
    size = 2 if packed else min(lengths) // 3
    trained = [np.arange(length) >= size for length in lengths]
    texts = [made_up(random, length, vocabulary).astype(np.int32) for length in lengths]
    if not packed:
        texts = [np.concatenate([texts[0][:size], text[size:]]) for text in texts]
    return Sequence(
        np.concatenate(texts),
        np.array(lengths, np.int32),
        np.concatenate(trained),
        np.arange(len(lengths)) if packed else np.array([number], np.int64),
        extra,
    )


def made_up(random: np.random.Generator, size: int, vocabulary: int) -> NDArray[np.int64]:
    """Random tokens, none of them special."""
    return random.integers(FIRST_TOKEN, vocabulary, size)


def _extra(method: MethodSettings, number: int) -> str | None:
    if method.learns_from == "labelled answers":
        return json.dumps({"label": number % 2 == 0})
    if method.learns_from == "graded pairs" and method.columns:
        return json.dumps({"margin": 0.5})
    return json.dumps({"prompt": "", "columns": {}}) if method.samples_online else None
