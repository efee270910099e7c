"""Asks a function of the user's about each row."""

from collections.abc import Sequence

import numpy as np

from ...config.curation import KeepStage
from ..row_changes import call
from ..shapes import RowError
from .stage import KEPT, Apply, Item, Outcome, StageContext


def keep(settings: KeepStage, _: StageContext) -> Apply:
    """The stage at work. A row for which the function fails cannot be used."""
    function = settings.function
    dropped = Outcome(dropped=f"{function.name} returns False")

    def decide(item: Item) -> Outcome:
        try:
            answer = call(function, item.row, "keep")
        except RowError as error:
            return Outcome(bad=str(error))
        if not isinstance(answer, bool | np.bool_):
            kind = type(answer).__name__
            return Outcome(bad=f"keep {function.name} returns {kind}; expected True or False")
        return KEPT if answer else dropped

    def apply(items: Sequence[Item]) -> list[Outcome]:
        return [decide(item) for item in items]

    return apply
