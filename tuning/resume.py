"""Checks whether a sweep's folder holds an earlier attempt at the same sweep; without Ray."""

from ..training.common.errors import InputError
from ..training.records.run_folder import Record
from ..training.run import differences
from .plan import Plan
from .sweep_folder import read_sweep

# A resumed sweep may change these; a change of anything else would make it another search.
_FREE_ON_RESUME = (
    *("trials", "time_budget", "concurrency", "stop_when", "retrain", "storage", "points"),
    "recipe.scale.max_failures",
)


def describe(plan: Plan) -> Record:
    """All settings of a sweep as plain values, for sweep.json and for the comparison on resume."""
    settings = plan.sweep.model_dump(mode="json", exclude={"recipe", "set", "search", "name"})
    space = {
        key: plan.space[key].model_dump(mode="json", exclude_none=True) for key in plan.space.keys
    }
    return {**settings, "search": space, "recipe": plan.recipe.model_dump(mode="json")}


def check_folder(plan: Plan) -> Record | None:
    """sweep.json of an earlier attempt; None for a new sweep.

    Raises:
        InputError: the folder holds a sweep with other settings, or a run.
    """
    earlier = read_sweep(plan.folder)
    if earlier is None:
        return None
    # The size of a population is fixed from its first generation on.
    free = tuple(key for key in _FREE_ON_RESUME if key != "trials" or not plan.is_population)
    changes = differences(earlier["settings"], describe(plan), free)
    if changes:
        raise InputError(
            f"{plan.folder} holds a sweep with other settings:\n" + "\n".join(changes) + "\n"
            "Give this one another name, or delete that folder."
        )
    return earlier
