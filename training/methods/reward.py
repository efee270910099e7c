"""A reward model: score texts so that the chosen answer's score is the higher one."""

from typing import TYPE_CHECKING

from ..config.metric import Metric
from ..data.examples import Method, Row
from ..data.shapes import Normalised, Pair
from .pairs import PAIR_MEASURES

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def _objective(setup: "Setup") -> "Objective":
    from ..objectives.reward import RewardObjective

    return RewardObjective(setup)


def _margin(_: Row, row: Normalised) -> Row | None:
    return {"margin": row.margin} if isinstance(row, Pair) and row.margin is not None else None


METHOD = Method(
    shapes=(Pair,),
    objective=_objective,
    measures=PAIR_MEASURES,
    watched=Metric("eval_reward_accuracy", "max"),
    head="score",
    extra=_margin,
)
