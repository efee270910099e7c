"""The table of `finray runs`."""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from ...training.common import formatting
from ...training.common.errors import InputError
from ...training.records.directions import direction_of
from ...training.records.run_folder import Record

SILENT_SECONDS = 120.0
"""A running run updates its record more often than this."""

HEADERS = (
    "name",
    "status",
    "method",
    "step",
    "loss",
    "eval loss",
    "match",
    "reward",
    "tokens",
    "started",
)
_OF_SOME = ("match", "reward")
_KEYS = {
    "eval loss": "eval_loss",
    "match": "exact_match",
    "reward": "eval_reward",
    "started": "started_at",
}
"""What is under a heading that is not called like it."""
LEFT_ALIGNED = 3
"""Number of columns with words; the others hold numbers, but for tags and notes at the end."""
_NOTE = 60
_GAP = "  "
_NARROWEST, _NARROWEST_AT_END, _NARROWEST_NAME = 8, 4, 24
"""Signs of a column of words that is cut: of one at the start, of tags and notes, of names."""
_CUT = "…"
_NAMED = 20


def render_runs(
    runs: Sequence[tuple[str, Record]],
    as_json: bool,
    now: datetime | None = None,
    *,
    sort: str | None = None,
    tag: str | None = None,
    recipes: Iterable[Record] = (),
    width: int | None = None,
) -> str:
    """The runs of a storage, in the order of their start, as text in columns or a JSON list.

    Args:
        runs: (name, run record), as `noted_runs` gives them.
        now: the time from which ages count, with its zone; the present by default.
        sort: a column, by its heading or its key, or a metric to sort by, the best first; runs
            without it come last. What has no direction that is better goes up.
        tag: only runs with this tag.
        recipes: those of the runs, for the direction of a metric of the user's own; they are read
            only where it needs them.
        width: columns of the terminal; None where there is none.

    Raises:
        InputError: no run has what they are to be sorted by, or the tag.
    """
    now = now or datetime.now(UTC)
    chosen = [run for run in runs if tag is None or tag in (run[1].get("tags") or ())]
    if runs and not chosen:
        raise InputError(f"--tag {tag}: no run has this tag{_among(_tags(runs))}")
    ordered = sorted(chosen, key=lambda run: (str(run[1].get("started_at") or ""), run[0]))
    if sort is not None and ordered:
        sort = _key_of(sort, ordered)
        ordered = _sorted_by(sort, ordered, now, recipes)
    entries = [_entry(name, record, now) for name, record in ordered]
    if as_json:
        return json.dumps(entries, indent=2)
    if not entries:
        return "no runs here yet"
    return _table(entries, sort, width)


def _table(entries: Sequence[Record], sort: str | None, width: int | None) -> str:
    """The columns; what runs are sorted by, their tags and notes only where there are some."""
    rows = _without_empty([list(HEADERS), *(list(_row(entry)) for entry in entries)])
    shown = {*HEADERS, *_KEYS.values(), "tags", "note"}
    if sort is not None and sort not in shown:
        rows[0].append(sort)
        for row, entry in zip(rows[1:], entries, strict=True):
            row.append(formatting.loss(_value(entry, sort)))
    words_from = len(rows[0])
    for key in ("tags", "note"):
        if any(entry[key] for entry in entries):
            rows[0].append(key)
            for row, entry in zip(rows[1:], entries, strict=True):
                text = " ".join(entry[key]) if key == "tags" else entry[key]
                row.append(_cut(formatting.one_line(text)))
    return _fitted(rows, words_from, width)


def _fitted(rows: list[list[str]], words_from: int, width: int | None) -> str:
    """The table with words cut to a terminal's width; where that is not enough, without its last
    columns, for which … stands: a number is never cut."""
    text = columns(rows, LEFT_ALIGNED, words_from, width, _NARROWEST_NAME)
    for kept in range(len(rows[0]) - 1, 0, -1):
        if width is None or max(map(len, text.splitlines())) <= width:
            break
        part = [[*row[:kept], _CUT] for row in rows]
        text = columns(part, LEFT_ALIGNED, min(words_from, kept), width, _NARROWEST_NAME)
    return text


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    """The rows without the columns that only some methods fill, where no run does."""
    kept = [
        index
        for index, (header, *values) in enumerate(zip(*rows, strict=True))
        if header not in _OF_SOME or set(values) != {formatting.MISSING}
    ]
    return [[row[index] for index in kept] for row in rows]


def _cut(text: str) -> str:
    return text if len(text) <= _NOTE else f"{text[: _NOTE - 1]}{_CUT}"


def _tags(runs: Sequence[tuple[str, Record]]) -> set[str]:
    return {tag for _, record in runs for tag in record.get("tags") or ()}


def _among(names: set[str]) -> str:
    return f"; there are {', '.join(sorted(names)[:_NAMED])}" if names else ""


def _key_of(name: str, runs: Sequence[tuple[str, Record]]) -> str:
    """What is under a heading; a metric of this name, such as a policy's reward, goes before it."""
    is_metric = any(name in (record.get("metrics") or {}) for _, record in runs)
    return name if is_metric else _KEYS.get(name, name)


def _sorted_by(
    key: str, runs: Sequence[tuple[str, Record]], now: datetime, recipes: Iterable[Record]
) -> list[tuple[str, Record]]:
    """The best first, by the metric's own direction; words and times in ascending order."""
    values = {name: _value(_entry(name, record, now), key) for name, record in runs}
    if all(value is None for value in values.values()):
        have = {"name", "status", "method", "step", "tokens", "started", "tags", "note"}
        have |= {name for _, record in runs for name in record.get("metrics") or {}}
        raise InputError(f"--sort {key}: no run has {key}{_among(have)}")
    numbers = any(formatting.is_number(value) for value in values.values())
    sign = -1 if numbers and direction_of(key, recipes) == "max" else 1

    def rank(run: tuple[str, Record]) -> tuple[bool, float, str]:
        value = values[run[0]]
        if formatting.is_number(value):
            return False, sign * value, ""
        return value is None, 0.0, str(value)

    return sorted(runs, key=rank)


def _value(entry: Record, key: str) -> Any:
    """A column of a run, else a metric; None for one that is empty."""
    value = entry[key] if key in entry else entry["metrics"].get(key)
    return value or None if isinstance(value, str | list) else _number(value)


def _entry(name: str, record: Record, now: datetime) -> Record:
    """Values of a run's row; None for missing ones."""
    metrics = record.get("metrics") or {}
    status = str(record.get("status") or "unknown")
    silent = _age(record.get("updated_at"), now)
    if status == "running" and silent is not None and silent > SILENT_SECONDS:
        status = "running?"
    return {
        "name": name,
        "status": status,
        "method": record.get("method"),
        "step": _number(record.get("step")),
        "total_steps": _number(record.get("total_steps")),
        "loss": _number(metrics.get("loss")),
        "eval_loss": _number(metrics.get("eval_loss")),
        "exact_match": _number(metrics.get("exact_match")),
        "eval_reward": _number(metrics.get("eval_reward")),
        "eval_reward_accuracy": _number(metrics.get("eval_reward_accuracy")),
        "tokens": _number(record.get("tokens")),
        "started_at": record.get("started_at"),
        "age_seconds": _age(record.get("started_at"), now),
        "silent_seconds": silent,
        "tags": record.get("tags") or [],
        "note": record.get("note") or "",
        "problem": record.get("problem"),
        "metrics": {key: _number(value) for key, value in metrics.items()},
    }


def _row(entry: Record) -> tuple[str, ...]:
    status = entry["status"]
    if status == "running?":
        status += f" silent {formatting.duration(entry['silent_seconds'])}"
    step = formatting.count(entry["step"])
    if entry["total_steps"] is not None:
        step += f"/{formatting.count(entry['total_steps'])}"
    age = entry["age_seconds"]
    return (
        formatting.one_line(entry["name"]),
        formatting.one_line(status),
        formatting.one_line(str(entry["method"] or formatting.MISSING)),
        step,
        formatting.loss(entry["loss"]),
        formatting.loss(entry["eval_loss"]),
        formatting.percent(entry["exact_match"]),
        _reward(entry),
        formatting.short_count(entry["tokens"]),
        formatting.MISSING if age is None else f"{formatting.duration(age)} ago",
    )


def _reward(entry: Record) -> str:
    """Mean reward on held-out prompts; for pairs, how often the chosen answer is preferred."""
    if entry["eval_reward"] is not None:
        return formatting.loss(entry["eval_reward"])
    return formatting.percent(entry["eval_reward_accuracy"])


def columns(
    rows: Sequence[Sequence[str]],
    left_aligned: int,
    words_from: int | None = None,
    width: int | None = None,
    narrowest_name: int | None = None,
) -> str:
    """A table: its columns of words are aligned left, the others right.

    Args:
        rows: the cells.
        left_aligned: number of columns with words, at the start.
        words_from: the first of those at the end; None for none there.
        width: columns of a terminal; words but the first of a row, which names it, are cut where
            lines would be longer. None cuts nothing.
        narrowest_name: signs to which that first word may be cut, too, after all others.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) if words_from is None else words_from
    words = [index for index in range(len(widths)) if index < left_aligned or index >= last]
    if width is not None:
        least = {
            index: _NARROWEST if index < left_aligned else _NARROWEST_AT_END for index in words[1:]
        }
        name = {} if narrowest_name is None else {0: narrowest_name}
        _shrink(widths, (least, name), width - len(_GAP) * (len(widths) - 1))
    lines = []
    for row in rows:
        cells = [
            shortened(cell, size).ljust(size) if index in words else cell.rjust(size)
            for index, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)


def _shrink(widths: list[int], groups: Iterable[dict[int, int]], room: int) -> None:
    """Make the widest columns of words narrower, until all have room; none if they cannot have.

    Args:
        widths: of all columns; changed.
        groups: columns that may be narrower, each with its least width; the first ones first.
        room: the signs that there are for all columns.
    """
    slack = [{index: max(0, widths[index] - least[index]) for index in least} for least in groups]
    if sum(widths) - sum(sum(each.values()) for each in slack) > room:
        return
    for each in slack:
        while sum(widths) > room and any(each.values()):
            widest = max(each, key=lambda index: each[index])
            widths[widest] -= 1
            each[widest] -= 1


def shortened(text: str, size: int) -> str:
    """A text of at most so many signs: prose loses its end, a path its middle."""
    if len(text) <= size:
        return text
    kept = size // 3 if " " not in text else size - 1
    return f"{text[:kept]}…{text[len(text) - (size - 1 - kept) :]}"


def _number(value: Any) -> float | None:
    return value if formatting.is_number(value) else None


def _age(iso: Any, now: datetime) -> float | None:
    """Seconds since an ISO time, which is in UTC unless it has a zone."""
    try:
        time = datetime.fromisoformat(str(iso))
    except ValueError:
        return None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return max(0.0, (now - time).total_seconds())
