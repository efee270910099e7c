"""The charts of a sweep's report, drawn as those of a run."""

import warnings
from collections.abc import Iterator, Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from ..training.common.formatting import is_number
from ..training.records.charts import Chart, Point, overlay, scatter
from ..training.records.labels import label_of
from ..training.records.run_folder import Record
from .sweep_folder import lineage

_STYLES = {"finished": "trial", "pruned": "trial-pruned", "failed": "trial-pruned"}
_ENOUGH = 2
"""Number of finished trials that a comparison needs."""
_ENOUGH_TO_EXPLAIN = 10
"""Trials; of fewer, the share of a setting is mostly chance."""


def progress_charts(record: Record) -> list[Chart]:
    """How the trials went: learning curves, and the best so far over all tokens."""
    charts = [learning_curves(record)]
    if len(record["objectives"]) == 1:
        charts.append(over_compute(record))
    return [chart for chart in charts if chart is not None]


def comparison_charts(record: Record) -> Iterator[Chart]:
    """Objectives over each other, then over each searched setting, of the finished trials."""
    rows = [row for row in record["trials"] if row["state"] == "finished" and row["values"]]
    if len(rows) < _ENOUGH:
        return
    names = [objective["metric"] for objective in record["objectives"]]
    chosen = [number for number, row in enumerate(rows) if row["number"] in record["best"]]
    made: list[Chart | None] = []
    if len(names) > 1:
        points = [(row["values"][0], row["values"][1]) for row in rows]
        front = f"{label_of(names[1]).title} over {label_of(names[0]).title}"
        form = label_of(names[1]).format
        made.append(scatter(front, points, format=form, unit=names[0], chosen=chosen))
    keys = dict.fromkeys(key for row in rows for key in row["settings"])
    for place, name in enumerate(names):
        for key in keys:
            points = [(row["settings"].get(key), row["values"][place]) for row in rows]
            if len({str(where) for where, _ in points}) > 1:
                title = key if len(names) == 1 else f"{name}: {key}"
                form = label_of(name).format
                short = key.rpartition(".")[2]
                made.append(scatter(title, points, format=form, unit=short, chosen=chosen))
    yield from (chart for chart in made if chart is not None)


def importances(study: optuna.Study) -> list[tuple[str, list[tuple[str, float]]]]:
    """Of each objective the share of its spread that each setting explains, the largest first.

    Empty where fewer than ten trials finished, or nothing differs between them.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < _ENOUGH_TO_EXPLAIN or not set.intersection(
        *(set(t.params) for t in finished)
    ):
        return []
    shares = []
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    for place, _ in enumerate(study.directions):
        if len({trial.values[place] for trial in finished}) < _ENOUGH:
            continue

        sign = 1.0 if study.directions[place] == StudyDirection.MINIMIZE else -1.0

        def value(trial: optuna.trial.FrozenTrial, place: int = place, sign: float = sign) -> float:
            return sign * float(trial.values[place])

        with warnings.catch_warnings():
            # It says that low values are good, as they are here.
            warnings.filterwarnings("ignore", "PedAnova", UserWarning)
            importances_of = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=value
            )
        shares.append((str(place), sorted(importances_of.items(), key=lambda item: -item[1])))
    return shares


def learning_curves(record: Record) -> Chart | None:
    """The objective of every trial over its tokens; the best trial is drawn last."""
    ordered = sorted(record["trials"], key=lambda row: row["number"] in record["best"])
    rows = [row for row in ordered if row["curve"]]
    series = [(_title(row, record), _whole_curve(record, row)) for row in rows]
    styles = [
        "main" if row["number"] in record["best"] else _STYLES.get(row["state"], "held-out")
        for row in rows
    ]
    name = record["objectives"][0]["metric"]
    text = label_of(name).title
    title = f"{text[:1].upper()}{text[1:]} of each trial"
    form = label_of(name).format
    return overlay(title, series, format=form, unit="tokens", styles=styles or ("main",))


def _title(row: Record, record: Record) -> str:
    best = ", the best" if row["number"] in record["best"] else ""
    return f"trial {row['number']} ({row['state']}{best})"


def _whole_curve(record: Record, row: Record) -> list[Point]:
    """A trial's curve, starting at the point where it took over another trial's weights."""
    own: Sequence[Sequence[float]] = row["curve"]
    parent = row.get("parent")
    start: Sequence[Sequence[float]] = []
    if parent is not None:
        before = lineage(record, row)[-2]["curve"]
        start = [point for point in before if point[0] == parent["tokens"]]
    return [(tokens, value if is_number(value) else None) for tokens, value in (*start, *own)]


def over_compute(record: Record) -> Chart | None:
    """The best objective so far over the trained tokens of all trials together."""
    ended = sorted((row for row in record["trials"] if row["ended"]), key=lambda row: row["ended"])
    sign = 1 if record["objectives"][0]["mode"] == "min" else -1
    spent, best = 0, None
    points: list[Point] = []
    for row in ended:
        if best is not None:
            points.append((spent + row["tokens"], best))  # the line is a stair
        spent += row["tokens"]
        value = row["values"][0] if row["values"] else None
        if value is not None and (best is None or sign * value < sign * best):
            best = value
        if best is not None:
            points.append((spent, best))
    name = record["objectives"][0]["metric"]
    series: list[tuple[str, list[Point]]] = [("the best so far", points)]
    rule = rule_of_thumb(record)
    if points and rule is not None and rule["values"]:
        level = rule["values"][0]
        series.append(("the rule of thumb", [(points[0][0], level), (points[-1][0], level)]))
    return overlay(
        "Best so far",
        series,
        format=label_of(name).format,
        unit="tokens",
        styles=("main", "reference"),
    )


def rule_of_thumb(record: Record) -> Record | None:
    """The trial with the settings of the rule of thumb, with which every search starts."""
    return next((row for row in record["trials"] if row["number"] == 0), None)
