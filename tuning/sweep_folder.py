"""A sweep's folder: its files, and what a reader finds in them."""

import json
from contextlib import suppress
from typing import Any

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.common.versions import check_format
from ..training.records.recorder import now
from ..training.records.run_folder import (
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    Record,
    parse_record,
)

SWEEP_FORMAT = 1
"""Of sweep.json; raised when an older finray could not read the folder."""
SWEEP_FILE = "sweep.json"
"""Settings, state and result of the sweep; `trials` holds a record of each."""
BEST_FILE = "best.yaml"
REPORT_FILE = "report.html"
STUDY_FILE = "optuna.db"
TRIALS_FOLDER = "trials"
PARETO_FOLDER = "pareto"
RETRAINED_FOLDER = "retrained"
_OF_THE_SWEEP = (SWEEP_FILE, BEST_FILE, REPORT_FILE, STUDY_FILE)
_OF_A_RUN = (RUN_FILE, RECIPE_FILE, METRICS_FILE)
_WEIGHTS = ("adapter", "model")


def read_sweep(folder: Folder) -> Record | None:
    """sweep.json as a record; None where the folder holds no sweep.

    Raises:
        InputError: the folder holds a run, sweep.json is not a JSON object, or a newer finray
            wrote it.
    """
    if folder.exists(RUN_FILE):
        raise InputError(f"{folder} holds a run, not a sweep; give the sweep another name")
    if not folder.exists(SWEEP_FILE):
        return None
    record = parse_record(folder.read(SWEEP_FILE))
    if record is None:
        raise InputError(f"{folder / SWEEP_FILE}: expected a JSON object")
    check_format(record, SWEEP_FORMAT, folder / SWEEP_FILE)
    return record


def write_sweep(folder: Folder, record: Record) -> None:
    """Replace sweep.json."""
    record["updated_at"] = now()
    numbered = {"format": SWEEP_FORMAT, **record} | {"format": SWEEP_FORMAT}
    text = json.dumps(numbered, indent=1, ensure_ascii=False, default=_plain)
    folder.write(SWEEP_FILE, text.encode() + b"\n")


def is_result(name: str) -> bool:
    """Whether a file of the folder (by its relative path) is of use to a reader elsewhere."""
    first, _, rest = name.partition("/")
    if first in (TRIALS_FOLDER, RETRAINED_FOLDER):
        return rest.partition("/")[2] in _OF_A_RUN
    return name in _OF_THE_SWEEP or first in (*_WEIGHTS, PARETO_FOLDER)


def saved_share(record: Record) -> float | None:
    """Of the tokens that all trials would have taken without pruning, the share not spent."""
    ended = [row for row in record["trials"] if row["state"] in ("finished", "pruned")]
    whole = len(ended) * record.get("trial_tokens", 0)
    if not whole:
        return None
    share: float = 1 - sum(row["tokens"] for row in ended) / whole
    return max(0.0, share)


def lineage(record: Record, row: Record) -> list[Record]:
    """A trial's row, behind those of the trials whose weights it goes on from."""
    rows = {one["number"]: one for one in record["trials"]}
    line = [row]
    while (parent := line[0].get("parent")) is not None:
        line.insert(0, rows[parent["trial"]])
    return line


def note(row: Record) -> str:
    """What there is to say of a trial beside its figures."""
    told = [str(text) for text in (row["error"], row["reason"]) if text]
    if row.get("parent") is not None:
        told.insert(0, f"from trial {row['parent']['trial']}")
    return "; ".join(told)


def trial_name(number: int) -> str:
    """Name of a trial's run."""
    return f"trial-{number:04d}"


def trial_folder(sweep: Folder, number: int) -> Folder:
    """Where a trial's run lies."""
    return sweep / TRIALS_FOLDER / trial_name(number)


def drop_weights(sweep: Folder, number: int, is_best: bool) -> None:
    """Delete an ended trial's checkpoints, and its result where it is none of the best.

    The workers of a trial that was given up may still write there: what cannot be deleted now is
    deleted when all have ended.
    """
    folder = trial_folder(sweep, number)
    for name in (CHECKPOINTS_FOLDER, *(() if is_best else _WEIGHTS)):
        with suppress(OSError):
            folder.delete(name)


def _plain(value: Any) -> Any:
    raise TypeError(f"not plain: {type(value).__name__}")
