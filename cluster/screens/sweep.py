"""The table of a sweep, and the line for a finished trial."""

import sys
from typing import Any

from ...training.common import formatting
from ...training.common.storage import Folder
from ...training.records.run_folder import Record
from ...tuning.progress import Ending, SweepProgress
from ...tuning.sweep_folder import BEST_FILE, REPORT_FILE, saved_share
from .runs import columns

_WORDS = 2
"""Number of columns with words."""
_REASON = 60


class SweepLines(SweepProgress):
    """A line on stderr for everything that happens."""

    def status(self, text: str) -> None:
        """What happens now."""
        print(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A warning, or something else to keep."""
        self.status(text)

    def trial_ended(self, ending: Ending, record: Record) -> None:
        """How a trial ended, and how far the sweep is."""
        print(render_ending(ending, record), file=sys.stderr)


def render_sweep(record: Record, folder: Folder) -> str:
    """State, trials (finished ones first, the best on top) and results of a sweep."""
    blocks = [_headline(record), _table(record), *_notes(record), *_places(record, folder)]
    return "\n".join(block for block in blocks if block)


def render_ending(ending: Ending, record: Record) -> str:
    """trial 7 pruned: eval_loss 0.1234 (best: 0.0812 of trial 3; 8 of 30)"""
    rows = record["trials"]
    ended = sum(row["state"] != "running" for row in rows)
    best = ""
    if record["best"]:
        row = next(row for row in rows if row["number"] == record["best"][0])
        best = f"best: {row['values'][0]:.6g} of trial {row['number']}; "
    total = record["settings"]["trials"]
    done = f"{ended} of at most {total}"
    if record["settings"]["pruning"]["kind"] == "pbt":
        finished = sum(row["state"] == "finished" for row in rows)
        done = f"{finished} of {total} members finished"
    text = formatting.one_line(ending.text)
    return f"trial {ending.number} {ending.state}: {text} ({best}{done})"


def _headline(record: Record) -> str:
    rows = record["trials"]
    counts = [
        f"{sum(row['state'] == state for row in rows)} {state}"
        for state in ("finished", "pruned", "failed", "running")
        if any(row["state"] == state for row in rows)
    ]
    facts = ", ".join(counts) or "no trial yet"
    seconds = formatting.duration(record.get("wall_seconds"))
    return f"sweep {record['name']} {record['status']}: {facts}; {seconds}"


def _table(record: Record) -> str:
    rows = record["trials"]
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    metrics = [objective["metric"] for objective in record["objectives"]]
    short = [key.rpartition(".")[2] for key in keys]
    names = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
    header = ["trial", "state", *metrics, *names, "tokens"]
    lines = [_line(row, keys, metrics, row["number"] in record["best"]) for row in _ordered(record)]
    if any(row.get("parent") for row in rows):
        header.append("from")
        for line, row in zip(lines, _ordered(record), strict=True):
            line.append(str(row["parent"]["trial"]) if row.get("parent") else "")
    return columns([header, *lines], _WORDS)


def _ordered(record: Record) -> list[Record]:
    sign = 1 if record["objectives"][0]["mode"] == "min" else -1

    def rank(row: Record) -> tuple[Any, ...]:
        state = ("finished", "running", "pruned", "failed").index(row["state"])
        value = row["values"][0] if row["values"] else row["latest"]
        return (state, sign * value if value is not None else 0.0, row["number"])

    return sorted(record["trials"], key=rank)


def _line(row: Record, keys: list[str], metrics: list[str], is_best: bool) -> list[str]:
    values = row["values"] or [row["latest"], *(None for _ in metrics[1:])]
    cells = [f"{value:.6g}" if value is not None else formatting.MISSING for value in values]
    settings = [_value(row["settings"].get(key)) for key in keys]
    number = f"{'*' if is_best else ' '}{row['number']}"
    return [number, row["state"], *cells, *settings, formatting.short_count(row["tokens"])]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return formatting.MISSING if value is None else formatting.one_line(str(value))


def _notes(record: Record) -> list[str]:
    notes = []
    if record.get("over"):
        notes.append(f"ended early: {record['over']}")
    share = saved_share(record)
    if share is not None and record["prunes"]:
        notes.append(f"pruning saved {formatting.percent(share)} of the tokens of whole trials")
    excluded = record["excluded"]["count"]
    if excluded:
        reason = formatting.one_line(record["excluded"]["first"][0]["reason"])
        notes.append(f"{excluded} combinations make no valid recipe, such as: {reason}")
    failed = [row for row in record["trials"] if row["state"] == "failed"]
    if failed:
        text = formatting.one_line(str(failed[-1]["error"]))
        notes.append(f"trial {failed[-1]['number']} failed: {text[: _REASON * 3]}")
    for name, value in (record.get("retrained") or {}).get("spread", {}).items():
        notes.append(f"retrained: {name} {value['mean']:.6g} ± {value['deviation']:.2g}")
    return notes


def _places(record: Record, folder: Folder) -> list[str]:
    names = [BEST_FILE, REPORT_FILE]
    if record.get("result"):
        names.insert(1, str(record["result"]))
    return [f"  {folder / name}" for name in names if folder.exists(name)]
