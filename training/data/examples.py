"""What a kind of fine-tuning adds to the common way of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..config.metric import Metric
from .shapes import Normalised

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup

Row = dict[str, Any]


def _as_it_is(row: Normalised) -> Normalised:
    return row


def _as_one(row: Normalised) -> tuple[Normalised, ...]:
    return (row,)


def _nothing_more(_: Row, __: Normalised) -> None:
    return None


def _never(_: Any) -> bool:
    return False


_LOSS = Metric("eval_loss", "min")


@dataclass(frozen=True)
class Method:
    """Asked by the pipeline and the loop, which know no method by name.

    `trains_on_all` and `starts_at_random` take the method's own settings from the recipe.
    Importing it needs no torch: the objective's module is imported when it is made.
    """

    shapes: tuple[type[Normalised], ...]
    """Rows that it learns from."""
    objective: Callable[["Setup"], "Objective"]
    """What it makes of a batch."""
    measures: tuple[str, ...]
    """What it logs beside the loss; held-out data gives the same names after `eval_`."""
    watched: Metric = _LOSS
    """Tells which checkpoint is the best."""
    head: Literal["causal", "score"] = "causal"
    """What the model puts out: logits of the next token, or one score of the whole text."""
    split: Callable[[Normalised], tuple[Normalised, ...]] = _as_one
    """The rows, each of one of `shapes`, that a row of the data stands for."""
    adapt: Callable[[Normalised], Normalised] = _as_it_is
    """A row as this method tokenises it; rows have one of `shapes` before."""
    extra: Callable[[Row, Normalised], Row | None] = _nothing_more
    """What of a row (as it was read, and as it was understood) goes with its tokens, as JSON."""
    splits_overlong: bool = False
    """A row that is too long becomes several sequences; otherwise `data.overlong` decides."""
    trains_on_all: Callable[[Any], bool] = _never
    """Whether every token bears loss, or only what an assistant wrote."""
    starts_at_random: Callable[[Any], bool] = _never
    """Whether only the base's configuration is used, with fresh weights."""
