"""The metrics that a run reports and a sweep can optimise, and their directions (min or max)."""

from ..training.common.errors import InputError
from ..training.config.metric import Metric
from ..training.config.recipe import Recipe
from .sweep import LoadedSweep, Objective

SIZES = ("adapter_bytes", "trainable_parameters")
"""Metrics that exist only after a trial has finished."""
_MORE_IS_BETTER = ("accuracy", "match", "margin", "reward", "chosen", "per_second")
_LESS_IS_BETTER = ("loss", "entropy", "kl", "bytes", "parameters", "clipped", "truncated")


def objectives(loaded: LoadedSweep) -> list[Metric]:
    """The sweep's metrics with their modes.

    Raises:
        InputError: for a metric that the base recipe's run never reports, and for one without a
            default mode if the sweep gives none.
    """
    return [
        _metric(objective, loaded.recipe, loaded.place("objective"))
        for objective in loaded.sweep.objective
    ]


def is_measured_during_training(metric: str, recipe: Recipe) -> bool:
    """True if a run reports the metric before its end, so a trial can be pruned by it."""
    return metric not in (*SIZES, "exact_match") and metric in reported_metrics(recipe)


def reported_metrics(recipe: Recipe) -> list[str]:
    """Names of all metrics that a run of the recipe reports."""
    method = recipe.method
    names = ["loss", *method.measures]
    reported = [*names, "tokens_per_second", *SIZES]
    if recipe.data.eval or recipe.data.holdout > 0:
        held_out = [f"eval_{name}" for name in names]
        reported = [*dict.fromkeys([method.watched.name, *held_out]), *reported]
    if recipe.eval.samples > 0:
        reported.append("exact_match")
    return reported


def _metric(objective: Objective, recipe: Recipe, place: str) -> Metric:
    name = objective.metric
    reported = reported_metrics(recipe)
    if name not in reported:
        hint = ""
        if name.startswith("eval_") and not any(item.startswith("eval_") for item in reported):
            hint = "; eval metrics need data.eval or data.holdout"
        if name == "exact_match":
            hint = "; exact_match needs eval.samples"
        raise InputError(
            f"{place}: objective: a run of method {recipe.method.kind} never reports {name!r}; it "
            f"reports {', '.join(reported)}{hint}"
        )
    mode = objective.mode or _mode(name, recipe)
    if mode is None:
        raise InputError(
            f"{place}: objective: {name} needs a mode: min if less is better, else max, as in "
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
