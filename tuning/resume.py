"""Whether a sweep's folder holds an earlier attempt at it; told without Ray."""

from ..training.common.errors import InputError
from ..training.records.run_folder import Record
from ..training.run import differences
from .plan import Plan
from .sweep_folder import read_sweep

# A sweep that goes on may change these; anything else would make it another search.
_FREE_ON_RESUME = (
    *("trials", "time_budget", "concurrency", "stop_when", "retrain", "storage", "points"),
    "recipe.scale.max_failures",
)


def describe(plan: Plan) -> Record:
    """The settings that make a sweep what it is, as plain values."""
    settings = plan.sweep.model_dump(mode="json", exclude={"recipe", "set", "search", "name"})
    space = {
        key: plan.space[key].model_dump(mode="json", exclude_none=True) for key in plan.space.keys
    }
    return {**settings, "search": space, "recipe": plan.recipe.model_dump(mode="json")}


def check_folder(plan: Plan) -> Record | None:
    """What an earlier attempt left; None for a new sweep.

    Raises:
        InputError: where the folder holds another sweep, or a run.
    """
    earlier = read_sweep(plan.folder)
    if earlier is None:
        return None
    # A population is as large as it was from its first turn on.
    free = tuple(one for one in _FREE_ON_RESUME if one != "trials" or not plan.is_population)
    changes = differences(earlier["settings"], describe(plan), free)
    if changes:
        raise InputError(
            f"{plan.folder} holds a sweep with other settings:\n" + "\n".join(changes) + "\n"
            "Give this one another name, or delete that folder."
        )
    return earlier
