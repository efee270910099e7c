"""Maps each kind of method to the objective that computes its loss."""

from collections.abc import Callable, Mapping

from ..objectives.cpo import CpoObjective, SimpoObjective
from ..objectives.cross_entropy import TokenObjective
from ..objectives.dpo import DpoObjective
from ..objectives.kto import KtoObjective
from ..objectives.objective import Objective, Setup
from ..objectives.orpo import OrpoObjective
from ..objectives.reward import RewardObjective
from ..rl.grpo import GrpoObjective
from ..rl.rloo import RlooObjective

OBJECTIVES: Mapping[str, Callable[[Setup], Objective]] = {
    "sft": TokenObjective,
    "pretrain": TokenObjective,
    "dpo": DpoObjective,
    "kto": KtoObjective,
    "orpo": OrpoObjective,
    "cpo": CpoObjective,
    "simpo": SimpoObjective,
    "reward": RewardObjective,
    "grpo": GrpoObjective,
    "rloo": RlooObjective,
}
"""By the recipe's `method.kind`; `config/methods.py` has the facts of each kind."""


def objective_of(setup: Setup) -> Objective:
    """The objective of a run's method."""
    return OBJECTIVES[setup.recipe.method.kind](setup)
