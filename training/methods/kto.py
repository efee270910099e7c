"""Kahneman-Tversky optimisation: learn from answers that were found good or bad, one by one.

Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306
"""

from typing import TYPE_CHECKING

from ..data.examples import Method, Row
from ..data.shapes import Labelled, Normalised, Pair

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup


def _objective(setup: "Setup") -> "Objective":
    from ..objectives.kto import KtoObjective

    return KtoObjective(setup)


def _unpaired(row: Normalised) -> tuple[Normalised, ...]:
    """A pair is a good answer and a bad one."""
    if isinstance(row, Pair):
        return Labelled(row.chosen, True), Labelled(row.rejected, False)
    return (row,)


def _label(_: Row, row: Normalised) -> Row:
    assert isinstance(row, Labelled)
    return {"label": row.label}


METHOD = Method(
    shapes=(Labelled,),
    objective=_objective,
    measures=("chosen_reward", "rejected_reward", "kl"),
    split=_unpaired,
    extra=_label,
)
