"""The metrics that a run reports and a sweep can optimise."""

from collections.abc import Sequence

from ..training.common.errors import InputError
from ..training.config.eval_metrics import answer_metrics
from ..training.config.metric import Metric
from ..training.config.recipe import Recipe
from .sweep import LoadedSweep, Objective

SIZES = ("adapter_bytes", "trainable_parameters")
_STEP = ("grad_norm", "tokens_per_second", "data_wait", "tokens", "seconds")
"""Metrics that a logged step of every method reports."""
_AT_THE_END = (*SIZES, "exact_match", "wall_seconds", "tokens")
"""Metrics by which an unfinished trial cannot be compared: they exist only at its end, or are equal
for all trials that are compared."""


def objectives(loaded: LoadedSweep) -> list[Metric]:
    """The sweep's metrics with their modes.

    Raises:
        InputError: for a metric that the base recipe's run never reports.
    """
    metrics = []
    for number, objective in enumerate(loaded.sweep.objective):
        place = loaded.place("objective" if loaded.names_objective else "recipe", number)
        if objective.metric not in reported_metrics(loaded.recipe):
            raise InputError(f"{place}: objective: {_why(objective, loaded)}")
        metric = loaded.recipe.metric(objective.metric)
        metrics.append(Metric(metric.name, objective.mode or metric.mode))
    return metrics


def check_reported(metrics: Sequence[Metric], recipe: Recipe) -> None:
    """Check that a trial with this recipe has a result.

    Raises:
        InputError: for a metric that its run never reports.
    """
    reported = reported_metrics(recipe)
    for metric in metrics:
        if metric.name not in reported:
            raise InputError(
                f"objective: {_never_reports(metric.name, recipe)}; search only settings whose "
                "runs report it, or choose another objective"
            )


def is_measured_during_training(metric: str, recipe: Recipe) -> bool:
    """True if a run reports the metric before its end, so a trial can be pruned by it."""
    return metric not in _AT_THE_END and metric in reported_metrics(recipe)


def reported_metrics(recipe: Recipe) -> list[str]:
    """Names of all metrics that a run of the recipe reports, the watched one first."""
    method = recipe.method
    reported = [*method.step_metrics(), *_STEP, "wall_seconds", *SIZES]
    if _holds_out(recipe):
        held_out = [f"eval_{name}" for name in method.held_out_metrics(recipe.trains_adapter)]
        reported = [
            *dict.fromkeys([recipe.watched.name, *held_out, *answer_metrics(recipe.eval.metrics)]),
            *reported,
        ]
    if recipe.eval.samples > 0:
        reported.append("exact_match")
    return reported


def _holds_out(recipe: Recipe) -> bool:
    return bool(recipe.data.eval) or recipe.data.holds_out


def _why(objective: Objective, loaded: LoadedSweep) -> str:
    """Why a metric cannot be the sweep's objective, and which ones can."""
    name, recipe = objective.metric, loaded.recipe
    text = _never_reports(name, recipe)
    if not loaded.names_objective:
        text = f"it is {name} unless the sweep names another one, but {text}"
    if name.startswith("eval_") and not _holds_out(recipe):
        return f"{text}; eval metrics need data.eval or data.holdout"
    if name == "exact_match":
        return f"{text}; exact_match needs eval.samples"
    return text


def _never_reports(name: str, recipe: Recipe) -> str:
    return (
        f"a run of method {recipe.method.kind} never reports {name!r}; it reports "
        f"{', '.join(reported_metrics(recipe))}"
    )
