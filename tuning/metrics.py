"""What a sweep can look for: the metrics that a run reports, and which way is better."""

from ..training.common.errors import InputError
from ..training.config.metric import Metric
from ..training.config.recipe import Recipe
from .sweep import LoadedSweep, Objective

SIZES = ("adapter_bytes", "trainable_parameters")
"""Known once a trial is finished."""
_MORE_IS_BETTER = ("accuracy", "match", "margin", "reward", "chosen", "per_second")
_LESS_IS_BETTER = ("loss", "entropy", "kl", "bytes", "parameters", "clipped", "truncated")


def objectives(loaded: LoadedSweep) -> list[Metric]:
    """The sweep's metrics with their modes.

    Raises:
        InputError: for a metric that the base recipe's run never reports, and one of which it is
            not known whether less or more is better.
    """
    return [
        _metric(objective, loaded.recipe, loaded.place("objective"))
        for objective in loaded.sweep.objective
    ]


def is_measured_on_the_way(metric: str, recipe: Recipe) -> bool:
    """Whether a run reports the metric before its end, so that a trial can be judged early."""
    return metric not in (*SIZES, "exact_match") and metric in reported_metrics(recipe)


def reported_metrics(recipe: Recipe) -> list[str]:
    """Everything that a run of the recipe reports."""
    method = recipe.method
    names = ["loss", *method.measures]
    told = [*names, "tokens_per_second", *SIZES]
    if recipe.data.eval or recipe.data.holdout > 0:
        held_out = [f"eval_{name}" for name in names]
        told = [*dict.fromkeys([method.watched.name, *held_out]), *told]
    if recipe.eval.samples > 0:
        told.append("exact_match")
    return told


def _metric(objective: Objective, recipe: Recipe, place: str) -> Metric:
    name = objective.metric
    known = reported_metrics(recipe)
    if name not in known:
        hint = ""
        if name.startswith("eval_") and not any(one.startswith("eval_") for one in known):
            hint = "; held-out measures need data.eval or data.holdout"
        if name == "exact_match":
            hint = "; exact_match needs eval.samples"
        raise InputError(
            f"{place}: objective: a run of method {recipe.method.kind} never reports {name!r}; it "
            f"reports {', '.join(known)}{hint}"
        )
    mode = objective.mode or _mode(name, recipe)
    if mode is None:
        raise InputError(
            f"{place}: objective: say whether less or more of {name} is better, as in "
            f"{{metric: {name}, mode: min}}"
        )
    return Metric(name, "min" if mode == "min" else "max")


def _mode(name: str, recipe: Recipe) -> str | None:
    watched = recipe.method.watched
    if name == watched.name:
        return watched.mode
    if any(part in name for part in _LESS_IS_BETTER):
        return "min"
    return "max" if any(part in name for part in _MORE_IS_BETTER) else None
