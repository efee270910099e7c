"""Preference optimisation without a reference: CPO and SimPO.

Xu et al., 2024, https://arxiv.org/abs/2401.08417; Meng et al., 2024,
https://arxiv.org/abs/2405.14734
"""

from typing import TYPE_CHECKING

from ..data.examples import Method
from ..data.shapes import Pair
from .pairs import PAIR_MEASURES

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def _objective(setup: "Setup") -> "Objective":
    from ..objectives.cpo import CpoObjective

    return CpoObjective(setup)


METHOD = Method(shapes=(Pair,), objective=_objective, measures=PAIR_MEASURES)
