"""The page of an evaluation: measures, preferences, and the answers with the wrong ones first.

It is a single file in the look of a run's report. Its template escapes all text: prompts and
answers are untrusted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..common import formatting
from ..config.eval_metrics import ANSWER_METRICS
from ..records.report import asset, page_environment
from ..records.run_folder import Record, is_match
from ..rl.rewards.reward import as_text
from .evaluate import AGAINST, BASE, OWN, Evaluation
from .scores import title_of

SHOWN = 100
"""Answers on the page; eval.jsonl has all."""
_LOWER_IS_BETTER = ("loss", "perplexity")


def render_page(evaluation: Evaluation) -> str:
    """The page as HTML."""
    record = evaluation.record
    here = Path(__file__).parent
    columns = columns_of(record)
    answered = [line for line in evaluation.lines if OWN in line]
    worst = worst_first(answered, record["measures"])
    template = page_environment(here).get_template("eval.html")
    return template.render(
        css=asset("report.css"),
        own_css=Markup((here / "eval.css").read_text(encoding="utf-8")),
        name=record["models"][OWN],
        subject=_subject(record),
        problems=evaluation.problems,
        columns=[column_title(record, column) for column in columns],
        names=[column_title(record, column) for column in (OWN, AGAINST) if column in columns],
        measures=[_measure(measure, columns) for measure in record["measures"]],
        note=_note(record),
        preferences=[_preference(one) for one in record["preferences"]],
        lead=_lead(len(answered), min(SHOWN, len(worst))),
        samples=[_sample(line, record) for line in worst[:SHOWN]],
        bad=record["bad"],
    )


def columns_of(record: Record) -> list[str]:
    """The columns in the order of tables: the base before what was made of it."""
    return [column for column in (BASE, OWN, AGAINST) if column in record["models"]]


def column_title(record: Record, column: str) -> str:
    """The title of a column: base, or the name of its model."""
    return "base" if column == BASE else str(record["models"][column])


def value_text(name: str, value: Any) -> str:
    """A value of a measure, for people; – without one."""
    fact = ANSWER_METRICS.get(name)
    if fact is not None and fact.largest == 1.0:
        return formatting.percent(value)
    if fact is not None:
        return f"{value:.1f}" if formatting.is_number(value) else formatting.MISSING
    return formatting.loss(value)


def worst_first(lines: Sequence[Record], measures: Sequence[Record]) -> list[Record]:
    """Lines by the first measure of answers that has values, its smallest values first."""
    names = [one["name"] for one in measures if one["name"] not in _LOWER_IS_BETTER]
    order = [name for name in names if any(_value(line, name) is not None for line in lines)]

    def key(line: Record) -> tuple[float, ...]:
        values = [_value(line, name) for name in order]
        return (*(2e9 if value is None else value for value in values), line["row"])

    return sorted(lines, key=key)


def _value(line: Record, name: str, column: str = OWN) -> float | None:
    value: float | None = line.get(f"{column}_values", {}).get(name)
    return value


def _subject(record: Record) -> list[tuple[str, str]]:
    pairs = [("Rows", f"{formatting.count(record['answered'])} of {record['rows']:,}")]
    pairs += [("Data", path) for path in record["data"]]
    if AGAINST in record["models"]:
        pairs.append(("Against", record["models"][AGAINST]))
    pairs.append(("Longest answer", f"{record['max_tokens']:,} tokens, greedy"))
    return pairs


def _measure(measure: Record, columns: Sequence[str]) -> dict[str, Any]:
    name, values = measure["name"], measure["values"]
    present = [value for value in values.values() if value is not None]
    choose = min if measure["mode"] == "min" else max
    best = choose(present) if len(present) > 1 and len(set(present)) > 1 else None
    intervals = measure.get("intervals", {})
    cells = [
        {
            "text": value_text(name, values.get(column)),
            "best": best is not None and values.get(column) == best,
            "interval": value_text(name, intervals[column]) if intervals.get(column) else "",
        }
        for column in columns
    ]
    unit = "tokens" if name in _LOWER_IS_BETTER else ""
    count = f"{formatting.count(measure['count'])} {unit}".strip()
    return {"title": measure["title"], "cells": cells, "count": count}


def _note(record: Record) -> str:
    failed = [one for one in record["measures"] if one.get("failures")]
    parts = [f"{one['title']} has no value for {one['failures']} answers" for one in failed]
    parts += record["remarks"]
    intervals = [one.get("intervals") or {} for one in record["measures"]]
    if any(value for each in intervals for value in each.values()):
        parts.append("± is a 95 % interval of the mean over rows, by its standard error")
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "." if parts else ""


def _preference(one: Record) -> dict[str, Any]:
    total = max(1, one["wins"] + one["ties"] + one["losses"])
    return {
        "by": "judge, both orders" if one["by"] == "judge" else title_of(one["by"]),
        "won": round(100 * one["wins"] / total, 2),
        "tied": round(100 * one["ties"] / total, 2),
        "text": f"{one['wins']:,} better, {one['ties']:,} equal, {one['losses']:,} worse",
    }


def _lead(answered: int, shown: int) -> str:
    if shown < answered:
        return f"The worst {shown} of {answered:,} answers, worst first; eval.jsonl has all."
    return "Worst first."


def _sample(line: Record, record: Record) -> dict[str, Any]:
    reference = line.get("reference")
    answers = []
    if reference is not None:
        answers.append({"label": "Reference", "text": reference, "matches": False})
    for column in (BASE, OWN, AGAINST):
        if column in line:
            answers.append(
                {
                    "label": column_title(record, column),
                    "text": line[column],
                    "matches": is_match(line[column], reference),
                }
            )
    values = [
        f"{one['title']} {value_text(one['name'], value)}"
        for one in record["measures"]
        if (value := _value(line, one["name"])) is not None
    ]
    prompt = as_text(line["prompt"])
    return {"row": line["row"], "scores": values, "prompt": prompt, "answers": answers}
