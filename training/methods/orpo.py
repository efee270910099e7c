"""Odds ratio preference optimisation: imitate and prefer the chosen answer in one, without a
reference.

Hong et al., 2024, https://arxiv.org/abs/2403.07691
"""

from typing import TYPE_CHECKING

from ..data.examples import Method
from ..data.shapes import Pair
from .pairs import PAIR_MEASURES

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def _objective(setup: "Setup") -> "Objective":
    from ..objectives.orpo import OrpoObjective

    return OrpoObjective(setup)


METHOD = Method(shapes=(Pair,), objective=_objective, measures=PAIR_MEASURES)
