"""The table of `finray runs`."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ...training.common import formatting
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
LEFT_ALIGNED = 3
"""Number of columns with words; the others hold numbers."""


def render_runs(
    runs: Sequence[tuple[str, Record]], as_json: bool, now: datetime | None = None
) -> str:
    """The runs of a storage, in the order of their start, as text in columns or a JSON list.

    Args:
        runs: (name, run record), as `list_runs` gives them.
        now: the time from which ages count, with its zone; the present by default.
    """
    now = now or datetime.now(UTC)
    ordered = sorted(runs, key=lambda run: (str(run[1].get("started_at") or ""), run[0]))
    entries = [_entry(name, record, now) for name, record in ordered]
    if as_json:
        return json.dumps(entries, indent=2)
    if not entries:
        return "no runs here yet"
    return columns([HEADERS, *(_row(entry) for entry in entries)], LEFT_ALIGNED)


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


def columns(rows: Sequence[Sequence[str]], left_aligned: int) -> str:
    """A table with its first `left_aligned` columns aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left_aligned else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


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
