"""Checks a sweep's folder: it holds this sweep or none, and can be written; without Ray."""

from ..training.common.errors import InputError
from ..training.config.places import about
from ..training.records.resume import differences
from ..training.records.run_folder import Record
from .plan import Plan
from .sweep_folder import check_complete, read_sweep

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
    with plan.sweep.locating(), about("name"):
        earlier = read_sweep(plan.folder)
        if earlier is None:
            return None
        if "settings" not in earlier:
            check_complete(earlier, plan.folder)
    # The size of a population is fixed from its first generation on.
    free = tuple(key for key in _FREE_ON_RESUME if key != "trials" or not plan.is_population)
    changes = differences(earlier["settings"], describe(plan), free)
    if changes:
        message = f"name: {plan.folder} holds a sweep with other settings:"
        remedy = "Give this one another name, or delete that folder."
        raise InputError(plan.sweep.located("\n".join([message, *changes, remedy])))
    with plan.sweep.locating(), about("name"):
        check_complete(earlier, plan.folder)
    return earlier


def check_writable(plan: Plan) -> None:
    """Try the sweep's storage.

    Raises:
        InputError: it is no folder, or nothing can be written there.
    """
    with plan.sweep.locating(), about("storage"):
        plan.folder.require_folder()
        plan.folder.require_writable()
