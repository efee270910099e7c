"""The plots of a sweep's report: those of Optuna, and two over trained tokens."""

from collections.abc import Callable, Iterator

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from ..training.records.run_folder import Record
from .sweep_folder import lineage

_COLOURS = {"finished": "#2f5bb7", "pruned": "#b9b4aa", "failed": "#b3261e", "running": "#b5520f"}
_ENOUGH = 2
"""Number of finished trials that a comparison needs."""


def plots(study: optuna.Study, record: Record) -> Iterator[tuple[str, go.Figure]]:
    """(title, figure) of every plot that the trials so far allow."""
    metrics = [objective["metric"] for objective in record["objectives"]]
    if any(row["curve"] for row in record["trials"]):
        yield "Learning curves", learning_curves(record)
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return
    if len(metrics) == 1:
        yield "Best so far over trained tokens", over_compute(record)
        name = metrics[0]
        yield "Over trials", visualization.plot_optimization_history(study, target_name=name)
    else:
        yield "Pareto front", visualization.plot_pareto_front(study, target_names=metrics)
    if len(finished) < _ENOUGH:
        return
    for place, name in enumerate(metrics):
        yield from _comparisons(study, place, name, finished)


def _comparisons(
    study: optuna.Study, place: int, name: str, finished: list[FrozenTrial]
) -> Iterator[tuple[str, go.Figure]]:
    target: Callable[[FrozenTrial], float] | None = None
    if len(study.directions) > 1:
        target = lambda trial: float(trial.values[place])  # noqa: E731
    options = {"target": target, "target_name": name}
    of = f" of {name}" if target else ""
    yield f"Parallel coordinates{of}", visualization.plot_parallel_coordinate(study, **options)
    values = {trial.values[place] for trial in finished}
    keys = set.intersection(*(set(trial.params) for trial in finished))
    if len(values) >= _ENOUGH and keys:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        importances = visualization.plot_param_importances(study, evaluator=evaluator, **options)
        yield f"Importance{of}", importances
    yield f"Slices{of}", visualization.plot_slice(study, **options)
    if len(keys) >= 2:
        yield f"Contours{of}", visualization.plot_contour(study, **options)


def learning_curves(record: Record) -> go.Figure:
    """The objective of every trial over its tokens; pruned trials are dotted and end in a cross."""
    figure = go.Figure()
    for row in record["trials"]:
        if not row["curve"]:
            continue
        tokens, values = zip(*_whole_curve(record, row), strict=True)
        is_pruned = row["state"] == "pruned"
        symbols = ["circle"] * (len(tokens) - 1) + ["x" if is_pruned else "circle"]
        figure.add_scatter(
            x=tokens,
            y=values,
            mode="lines+markers",
            name=f"trial {row['number']} ({row['state']})",
            line={"color": _COLOURS[row["state"]], "dash": "dot" if is_pruned else "solid"},
            marker={"symbol": symbols, "size": 6},
            opacity=1.0 if row["number"] in record["best"] else 0.7,
        )
    rung = record.get("first_rung")
    if rung:
        figure.add_vline(x=rung, line_dash="dash", line_color="#6a665e", annotation_text="rung")
    return _labelled(figure, "trained tokens of the trial", record)


def _whole_curve(record: Record, row: Record) -> list[list[float]]:
    """A trial's curve, starting at the point where it took over another trial's weights."""
    parent = row.get("parent")
    if parent is None:
        return list(row["curve"])
    before: list[list[float]] = lineage(record, row)[-2]["curve"]
    start = [point for point in before if point[0] == parent["tokens"]]
    return [*start, *row["curve"]]


def over_compute(record: Record) -> go.Figure:
    """The best objective so far over the trained tokens of all trials together."""
    ended = sorted((row for row in record["trials"] if row["ended"]), key=lambda row: row["ended"])
    sign = 1 if record["objectives"][0]["mode"] == "min" else -1
    spent, best = 0, None
    points: list[tuple[int, float]] = []
    for row in ended:
        spent += row["tokens"]
        value = row["values"][0] if row["values"] else None
        if value is not None and (best is None or sign * value < sign * best):
            best = value
        if best is not None:
            points.append((spent, best))
    tokens, values = zip(*points, strict=True) if points else ((), ())
    figure = go.Figure()
    figure.add_scatter(
        x=tokens, y=values, mode="lines+markers", line={"shape": "hv", "color": "#2f5bb7"}
    )
    return _labelled(figure, "trained tokens, all trials", record)


def _labelled(figure: go.Figure, tokens: str, record: Record) -> go.Figure:
    figure.update_layout(xaxis_title=tokens, yaxis_title=record["objectives"][0]["metric"])
    values = [value for row in record["trials"] for _, value in row["curve"]]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        figure.update_yaxes(type="log")
    return figure
