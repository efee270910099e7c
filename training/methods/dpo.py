"""Direct preference optimisation: prefer the chosen answer, without a reward model.

Rafailov et al., 2023, https://arxiv.org/abs/2305.18290
"""

from typing import TYPE_CHECKING

from ..data.shapes import Normalised, Pair
from .method import Method, Row

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def _objective(setup: "Setup") -> "Objective":
    from ..objectives.dpo import DpoObjective

    return DpoObjective(setup)


def _extra(_: Row, row: Normalised) -> Row | None:
    return {"margin": row.margin} if isinstance(row, Pair) and row.margin is not None else None


METHOD = Method(
    shapes=(Pair,),
    objective=_objective,
    measures=("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward"),
    extra=_extra,
)
