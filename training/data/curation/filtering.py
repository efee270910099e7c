"""Drops rows by their size and by what they repeat."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...config.curation import FilterStage
from ..rendering import load_renderer
from .stage import KEPT, Apply, Item, Outcome, StageContext
from .words import distinct, word_runs

RUN = 5
"""Words in a run whose repetition counts."""
_CHARACTERS = 16
"""Characters for each token that has to be there, of which the beginning of a row is tokenised."""

_SHORT = Outcome(dropped="too short")
_REPETITIVE = Outcome(dropped="repeats itself")


def filter_rows(settings: FilterStage, context: StageContext) -> Apply:
    """Make the stage `filter`: rows that are too short or repetitive are dropped."""

    def apply(items: Sequence[Item]) -> list[Outcome]:
        texts = [item.texts for item in items]
        outcomes = [KEPT] * len(items)
        if settings.max_repetition is not None:
            for number in np.flatnonzero(repetition(texts) > settings.max_repetition):
                outcomes[number] = _REPETITIVE
        if settings.min_tokens is not None:
            tokenizer = load_renderer(context.render).tokenizer
            enough = has_tokens(
                ["\n".join(parts) for parts in texts], settings.min_tokens, tokenizer
            )
            outcomes = [
                outcome if is_long else _SHORT
                for outcome, is_long in zip(outcomes, enough, strict=True)
            ]
        return outcomes

    return apply


def has_tokens(texts: Sequence[str], least: int, tokenizer: Any) -> list[bool]:
    """Whether each text has a number of tokens; of a long text, only the beginning is tokenised if
    that has twice as many."""
    starts = [text[: _CHARACTERS * least] for text in texts]
    counts = _counts(starts, tokenizer)
    unsure = [
        number
        for number, (text, start, count) in enumerate(zip(texts, starts, counts, strict=True))
        if len(start) < len(text) and count < 2 * least
    ]
    for number, count in zip(unsure, _counts([texts[n] for n in unsure], tokenizer), strict=True):
        counts[number] = count
    return [count >= least for count in counts]


def _counts(texts: Sequence[str], tokenizer: Any) -> list[int]:
    if not texts:
        return []
    # UTF-8 cannot encode a lone surrogate.
    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    return [len(ids) for ids in tokenizer(clean, add_special_tokens=False)["input_ids"]]


def repetition(rows: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """The share of word runs that stood before in the same text; of a row, its largest.

    Args:
        rows: the texts of each row.
    """
    owners = np.repeat(np.arange(len(rows)), [len(texts) for texts in rows])
    runs = word_runs([text for texts in rows for text in texts], RUN)
    shares = np.zeros(len(rows))
    for number in np.flatnonzero(runs.words > RUN):
        hashes = runs.hashes[runs.offsets[number] : runs.offsets[number + 1]]
        share = 1 - len(distinct(hashes)) / len(hashes)
        shares[owners[number]] = max(shares[owners[number]], share)
    return shares
