"""Writes texts in one way."""

import re
import unicodedata
from collections.abc import Sequence
from functools import partial

from ...config.curation import NormaliseStage
from ..shapes import RowError
from .stage import KEPT, Apply, Item, Outcome, StageContext
from .texts import rewritten

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_LINE_ENDS = re.compile(r"\r\n?")


def normalise(settings: NormaliseStage, _: StageContext) -> Apply:
    """Make the stage `normalise`, which rewrites the texts of a row."""
    change = partial(normal_form, form=settings.unicode)

    def apply(items: Sequence[Item]) -> list[Outcome]:
        return [_outcome(item) for item in items]

    def _outcome(item: Item) -> Outcome:
        try:
            row = rewritten(item.row, change)
        except RowError as error:
            return Outcome(bad=str(error))
        return KEPT if row is item.row else Outcome(row=row)

    return apply


def normal_form(text: str, form: str) -> str:
    """The text in a Unicode form, with line feeds as line ends and without other control
    characters but tabs; the same object if it is so already."""
    if _CONTROLS.search(text):
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    if text.isascii() or unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return text
    return unicodedata.normalize(form, text)  # type: ignore[arg-type]
