"""A sweep's folder: the names of its files, and reading and writing of sweep.json."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.common.versions import check_format
from ..training.config.metric import Metric
from ..training.records.recorder import now
from ..training.records.run_folder import (
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    Record,
    check_types,
    read_if_there,
    require_record,
)

SWEEP_FORMAT = 1
"""Format number of sweep.json; it grows with each change that an older finray cannot read."""
SWEEP_FILE = "sweep.json"
"""Settings, state and result of the sweep; `trials` holds one record for each trial."""
BEST_FILE = "best.yaml"
REPORT_FILE = "report.html"
STUDY_FILE = "optuna.db"
TRIALS_FOLDER = "trials"
PARETO_FOLDER = "pareto"
RETRAINED_FOLDER = "retrained"
_OF_THE_SWEEP = (SWEEP_FILE, BEST_FILE, REPORT_FILE, STUDY_FILE)
_OF_A_RUN = (RUN_FILE, RECIPE_FILE, METRICS_FILE)
_WEIGHTS = ("adapter", "model")
_REMEDY = "restore it, or move the folder away"
_TYPES: dict[str, type] = {
    **dict.fromkeys(("name", "status", "error", "over", "result"), str),
    **dict.fromkeys(("settings", "excluded", "retrained"), dict),
    **dict.fromkeys(("objectives", "trials", "best", "prepared"), list),
    **dict.fromkeys(("wall_seconds", "trial_tokens"), float),
}
"""The types of the values in sweep.json; each may be null or absent."""
_ITEM_TYPES: dict[str, dict[str, type]] = {
    "objectives": {"metric": str, "mode": str},
    "trials": {
        "number": int,
        "state": str,
        "settings": dict,
        "values": list,
        "latest": float,
        "tokens": float,
        "error": str,
        "reason": str,
        "parent": dict,
    },
}
"""The types in the objects of a list."""
_NEEDED = ("name", "status", "settings", "objectives", "trials", "best", "excluded", "prunes")
_NEEDED_OF_A_TRIAL = ("number", "state", "settings", "tokens")
_OF_A_TRIAL = ("values", "latest", "error", "reason")
"""What every trial has, and may be null."""


def read_sweep(folder: Folder) -> Record | None:
    """The content of sweep.json; None if the folder holds no sweep.

    Raises:
        InputError: the folder holds a run, sweep.json is not a JSON object or holds another type
            than it should, or a newer finray wrote it.
    """
    if folder.exists(RUN_FILE):
        raise InputError(f"{folder} holds a run, not a sweep; give the sweep another name")
    content = read_if_there(folder, SWEEP_FILE)
    if content is None:
        return None
    place = f"{folder / SWEEP_FILE}"
    record = require_record(content, place, _REMEDY)
    check_format(record, SWEEP_FORMAT, folder / SWEEP_FILE)
    check_types(record, _TYPES, place, remedy=_REMEDY)
    for key, types in _ITEM_TYPES.items():
        for item in record.get(key) or ():
            check_types({key: item}, {key: dict}, place, needed=(key,), remedy=_REMEDY)
            check_types(item, types, f"{place}: {key}", remedy=_REMEDY)
    return record


def existing_sweep(folder: Folder) -> Record:
    """The content of sweep.json of a sweep that must exist, with all that every one has.

    Raises:
        InputError: as `read_sweep`, and if the folder holds no sweep, or a key is missing.
    """
    record = read_sweep(folder)
    if record is None:
        raise InputError(f"{folder} holds no sweep; name a sweep's folder")
    check_complete(record, folder)
    return record


def check_complete(record: Record, folder: Folder) -> None:
    """Check that sweep.json has all that is read of every sweep.

    Raises:
        InputError: a key is missing.
    """
    missing = [key for key in _NEEDED if record.get(key) is None]
    missing += [
        f"excluded: {key}"
        for key in ("count", "first")
        if key not in (record.get("excluded") or ())
    ]
    for row in record.get("trials") or ():
        missing += [f"trials: {key}" for key in _NEEDED_OF_A_TRIAL if row.get(key) is None]
        missing += [f"trials: {key}" for key in _OF_A_TRIAL if key not in row]
    if missing:
        raise InputError(f"{folder / SWEEP_FILE}: {missing[0]} is missing; {_REMEDY}")


def read_earlier(folder: Folder, metrics: Sequence[Metric]) -> Record:
    """sweep.json of a sweep whose results another one with these objectives can use.

    Raises:
        InputError: the folder holds no sweep, or one with other objectives.
    """
    record = read_sweep(folder)
    if record is None or not folder.exists(STUDY_FILE):
        missing = SWEEP_FILE if record is None else STUDY_FILE
        raise InputError(f"{folder} holds no sweep (it has no {missing}); remove it")
    theirs = [f"{item['metric']} ({item['mode']})" for item in record.get("objectives", [])]
    ours = [f"{metric.name} ({metric.mode})" for metric in metrics]
    if theirs != ours:
        raise InputError(
            f"the sweep in {folder} has another objective: {', '.join(theirs)}, and this one "
            f"{', '.join(ours)}; remove it, or set objective"
        )
    return record


def write_sweep(folder: Folder, record: Record) -> None:
    """Write sweep.json with the current time and the format number."""
    record["updated_at"] = now()
    numbered = {"format": SWEEP_FORMAT, **record} | {"format": SWEEP_FORMAT}
    text = json.dumps(numbered, indent=1, ensure_ascii=False, default=_plain)
    folder.write(SWEEP_FILE, text.encode() + b"\n")


def is_result(name: str) -> bool:
    """True if a file (by its path in the folder) belongs to the results that a user fetches."""
    first, _, rest = name.partition("/")
    if first in (TRIALS_FOLDER, RETRAINED_FOLDER):
        return rest.partition("/")[2] in _OF_A_RUN
    return name in _OF_THE_SWEEP or first in (*_WEIGHTS, PARETO_FOLDER)


def saved_share(record: Record) -> float | None:
    """Share of tokens (0 to 1) that pruning saved, compared with whole trials; None without any.

    A whole trial has as many as the finished ones on average, for want of those what is expected.
    """
    by_state = {
        state: [row["tokens"] for row in record["trials"] if row["state"] == state]
        for state in ("finished", "pruned")
    }
    finished, pruned = by_state["finished"], by_state["pruned"]
    whole = sum(finished) / len(finished) if finished else record.get("trial_tokens", 0)
    saved: float = sum(max(0.0, whole - tokens) for tokens in pruned)
    used = sum(finished) + sum(pruned)
    return saved / (used + saved) if used + saved else None


def lineage(record: Record, row: Record) -> list[Record]:
    """Rows of the trials whose weights a trial continues from, oldest first, then its own row."""
    rows = {trial["number"]: trial for trial in record["trials"]}
    line = [row]
    while (parent := line[0].get("parent")) is not None:
        line.insert(0, rows[parent["trial"]])
    return line


def note(row: Record) -> str:
    """Text of the note column of a trial: its parent, its error, why it was pruned."""
    notes = [str(text) for text in (row["error"], row["reason"]) if text]
    if row.get("parent") is not None:
        notes.insert(0, f"from trial {row['parent']['trial']}")
    return "; ".join(notes)


def trial_name(number: int) -> str:
    """Name of a trial's run, such as trial-0007."""
    return f"trial-{number:04d}"


def trial_folder(sweep: Folder, number: int) -> Folder:
    """Folder of a trial's run."""
    return sweep / TRIALS_FOLDER / trial_name(number)


def drop_weights(sweep: Folder, number: int, is_best: bool) -> None:
    """Delete an ended trial's checkpoints, and its result unless it is one of the best.

    Workers of a pruned trial may still write there: files that cannot be deleted now are deleted
    at the end of the sweep.
    """
    folder = trial_folder(sweep, number)
    for name in (CHECKPOINTS_FOLDER, *(() if is_best else _WEIGHTS)):
        with suppress(OSError):
            folder.delete(name)


def _plain(value: Any) -> Any:
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")
