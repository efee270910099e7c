"""The page of `finray runs compare`: several runs side by side, in a single file."""

from typing import Any

from ..common.formatting import MISSING, count, is_number
from .comparison import ComparedAnswers, Comparison
from .labels import label_of
from .report import Answer, Sample, asset, page_environment

SHOWN = 100
"""Prompts of which the page shows the answers."""


def render_page(comparison: Comparison) -> str:
    """The page as HTML."""
    charts = comparison.charts()
    return (
        page_environment()
        .get_template("comparison.html")
        .render(
            css=asset("report.css"),
            script=asset("report.js"),
            names=comparison.names,
            facts=comparison.facts,
            tables=[
                ("Settings", _rows(comparison.settings), "No setting differs."),
                ("Started from", _rows(comparison.inputs), ""),
            ],
            metrics=metric_rows(comparison),
            loss=charts[0] if charts else None,
            charts=charts[1:],
            samples=[_sample(item, comparison.names) for item in comparison.answers[:SHOWN]],
            matched=matched(comparison),
        )
    )


def metric_rows(comparison: Comparison) -> list[tuple[str, list[str], list[str]]]:
    """(title, value of each run, its difference from the first run)."""
    rows = []
    for name, values in comparison.metrics.items():
        label = label_of(name)
        differences = ["", *(label.difference(values[0], value) for value in values[1:])]
        rows.append((label.title, [label.write(value) for value in values], differences))
    return rows


def matched(comparison: Comparison) -> list[str]:
    """How many of each run's answers are the reference: 12 of 20; empty without references."""
    rows = [item for item in comparison.answers if item.reference is not None]
    if not rows:
        return []
    matches = zip(*(item.matches for item in rows), strict=True)
    answers = zip(*(item.answers for item in rows), strict=True)
    given = [sum(answer is not None for answer in column) for column in answers]
    return [
        f"{sum(right)} of {asked}" if asked else MISSING
        for right, asked in zip(matches, given, strict=True)
    ]


def _rows(values: dict[str, list[Any]]) -> list[tuple[str, list[str]]]:
    return [(key, [setting_text(value) for value in row]) for key, row in values.items()]


def setting_text(value: Any) -> str:
    """A setting as text, whole."""
    if value is None or value == []:
        return MISSING
    if is_number(value):
        return count(value) if isinstance(value, int) and value >= 10_000 else f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sample(item: ComparedAnswers, names: list[str]) -> Sample:
    answers = [] if item.reference is None else [Answer("Reference", item.reference, False)]
    for name, text, is_right in zip(names, item.answers, item.matches, strict=True):
        if text is not None:
            answers.append(Answer(name, text, is_right))
    return Sample("", item.prompt, answers)
