"""Direct preference optimisation: prefer the chosen answer, without a reward model.

Rafailov et al., 2023, https://arxiv.org/abs/2305.18290
"""

from typing import TYPE_CHECKING

from ..data.examples import Method
from ..data.shapes import Pair
from .pairs import PAIR_MEASURES

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def _objective(setup: "Setup") -> "Objective":
    from ..objectives.dpo import DpoObjective

    return DpoObjective(setup)


METHOD = Method(shapes=(Pair,), objective=_objective, measures=PAIR_MEASURES)
