"""Supervised fine-tuning: imitate the answers."""

from typing import TYPE_CHECKING

from ..config.methods import SftMethod
from ..data.examples import Method
from ..data.shapes import Completion, Conversation, Text

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def token_objective(setup: "Setup") -> "Objective":
    """The next token's cross-entropy."""
    from ..objectives.cross_entropy import TokenObjective

    return TokenObjective(setup)


def _trains_on_all(settings: SftMethod) -> bool:
    return settings.train_on == "all"


METHOD = Method(
    shapes=(Conversation, Completion, Text),
    objective=token_objective,
    measures=("token_accuracy", "entropy"),
    trains_on_all=_trains_on_all,
)
