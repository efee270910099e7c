"""The settings that determine how a row becomes tokens."""

import datetime
from dataclasses import dataclass
from typing import Literal

from ..config.recipe import Recipe
from ..config.sections import TEMPLATE_DATE
from .answers import TurnRules


@dataclass(frozen=True)
class RenderSettings:
    """The settings that determine how a row becomes tokens."""

    base: str
    revision: str | None
    trust_remote_code: bool
    chat_template: str | None
    train_on_all: bool
    split_overlong: bool
    """Split every text that is too long into pieces, as in continued pretraining."""
    max_length: int
    overlong: Literal["drop", "truncate", "truncate_left", "split"]
    train_on_last: bool = False
    train_on_reasoning: bool = True
    template: Literal["own", "training"] = "own"
    date: str = TEMPLATE_DATE.isoformat()
    add_tokens: Literal["auto"] | tuple[str, ...] = ()
    rows: int | None = None
    """Rows of the base's embedding, which must have one for each token; None checks nothing."""

    @property
    def day(self) -> datetime.date:
        """The day that templates see which read the clock."""
        return datetime.date.fromisoformat(self.date)

    def turn_rules(self, as_one: bool) -> TurnRules:
        """Which turns are trained.

        Args:
            as_one: the trained answers of a row have to stand in one text.
        """
        return TurnRules(self.train_on_all, self.train_on_last, self.train_on_reasoning, as_one)

    @classmethod
    def of(cls, recipe: Recipe) -> "RenderSettings":
        return cls(
            base=recipe.model.base,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            chat_template=recipe.data.chat_template,
            train_on_all=recipe.method.trains_on_all,
            split_overlong=recipe.method.splits_overlong or recipe.data.overlong == "split",
            max_length=recipe.row_length,
            overlong=recipe.data.overlong,
            train_on_last=recipe.method.trains_on_last,
            train_on_reasoning=recipe.method.trains_on_reasoning,
            template=recipe.data.template,
            date=recipe.data.date,
            add_tokens=recipe.model.add_tokens,
        )
