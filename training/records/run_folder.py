"""The files of a run's folder: their names, and how each is read and written."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..common.errors import InputError, reason
from ..common.formatting import one_line
from ..common.scratch import scratch_folder
from ..common.storage import Folder
from ..common.versions import NewerFormatError, check_format
from ..common.yaml_text import load_yaml

RUN_FORMAT = 1
"""Format of run.json; increased when an older finray cannot read the folder."""
RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
"""Completions that an online method sampled during training, with their rewards."""
REPORT_FILE = "report.html"
CHECKPOINTS_FOLDER = "checkpoints"
STACKS_FOLDER = "stacks"
"""Stack traces of each rank that ended because a step hung."""
PREPARED_FOLDER = "prepared"
"""Prepared data, which runs share; a folder of the storage, beside the runs."""
UNREADABLE = "unreadable"
"""The status of a run whose run.json cannot be used; no run.json holds it."""
_REMEDY = "restore it, or move the folder away"

Record = dict[str, Any]
"""A JSON object."""

_RUN_TYPES: dict[str, type] = {
    **dict.fromkeys(("status", "name", "method", "base", "error", "result", "prepared"), str),
    **dict.fromkeys(("device", "dtype", "strategy", "save_error", "best_checkpoint", "over"), str),
    **dict.fromkeys(("step", "total_steps", "tokens", "last_saved_step"), int),
    **dict.fromkeys(("micro_batch_size", "micro_batch_tokens", "evaluation_parts"), int),
    **dict.fromkeys(("wall_seconds", "save_wait_seconds"), float),
    **dict.fromkeys(("metrics", "before", "parameters", "data", "versions"), dict),
    **dict.fromkeys(("identity", "commits", "model_code", "adapted", "rehearsal", "decided"), dict),
    **dict.fromkeys(("restarts", "skipped", "world_sizes", "nodes", "notices", "tags"), list),
}
"""The types of the values in run.json; each may be null or absent."""
_ITEM_TYPES: dict[str, dict[str, type]] = {
    "restarts": {"step": int, "reason": str},
    "skipped": {"step": int},
}
"""The types in the objects of a list."""
_TEXT_LISTS = ("nodes", "notices", "tags")
"""Lists of texts."""
_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


def read_run(folder: Folder) -> Record | None:
    """run.json as a record; None if the folder contains no run.

    Raises:
        InputError: run.json is not a JSON object, holds another type than it should, or a newer
            finray wrote it.
    """
    content = read_if_there(folder, RUN_FILE)
    if content is None:
        return None
    place = folder / RUN_FILE
    record = require_record(content, f"{place}", _REMEDY)
    check_format(record, RUN_FORMAT, place)
    check_types(record, _RUN_TYPES, f"{place}", remedy=_REMEDY)
    for key, types in _ITEM_TYPES.items():
        for item in record.get(key) or ():
            check_types({key: item}, {key: dict}, f"{place}", needed=(key,), remedy=_REMEDY)
            check_types(item, types, f"{place}: {key}", needed=("step",), remedy=_REMEDY)
    for key in _TEXT_LISTS:
        for item in record.get(key) or ():
            check_types({key: item}, {key: str}, f"{place}", needed=(key,), remedy=_REMEDY)
    return record


def read_listed(folder: Folder) -> Record | None:
    """As `read_run`, for lists of runs, in which one damaged file hides no other run.

    Returns:
        For a run.json that `read_run` refuses, what `unreadable` returns.
    """
    try:
        return read_run(folder)
    except InputError as error:
        return unreadable(error)


def unreadable(error: InputError) -> Record:
    """What lists hold in place of a record that cannot be read.

    Its status is UNREADABLE, what is wrong and what to do stands under `problem`, and `is_whole`
    is true if a newer finray can read it.
    """
    is_whole = isinstance(error, NewerFormatError)
    return {"status": UNREADABLE, "problem": str(error), "is_whole": is_whole}


def check_run_folder(folder: Folder) -> None:
    """Check the files of a run that a resumed run reads and goes on writing.

    Raises:
        InputError: a file stands where a folder belongs, a line of metrics, samples or rollouts is
            damaged, or there are checkpoints without run.json.
    """
    for place in (folder, folder / CHECKPOINTS_FOLDER):
        if place.filesystem.get_file_info(place.path).is_file:
            raise InputError(f"{place}: a file, where the run needs a folder; move it away")
    for read in (read_metrics, read_samples, read_rollouts):
        read(folder)
    is_run = read_run(folder) is not None
    if not is_run and (names := (folder / CHECKPOINTS_FOLDER).names()):
        raise InputError(
            f"{folder}: holds the checkpoint {names[-1]}, but no {RUN_FILE}, which says what it "
            f"belongs to; restore {RUN_FILE} and {RECIPE_FILE}, or delete that folder"
        )


def existing_run(folder: Folder) -> Record:
    """run.json of a run that must exist.

    Raises:
        InputError: the folder contains no run, or run.json is not a JSON object.
    """
    run = read_run(folder)
    if run is None:
        raise InputError(f"{folder} holds no run: there is no {RUN_FILE}; name a run's folder")
    return run


@dataclass(frozen=True)
class FinishedRun:
    """A finished run and its result."""

    folder: Folder
    record: Record
    """Content of run.json."""
    recipe: Record
    """Content of recipe.yaml, as plain values."""
    kind: Literal["adapter", "model"]
    """The kind of result: an adapter for the base model, or a whole model."""

    @property
    def result(self) -> Folder:
        """The folder of the adapter or model."""
        return self.folder / self.kind

    @contextmanager
    def local_result(self) -> Iterator[Path]:
        """The result on a local disk: the folder itself, or a copy that the context deletes."""
        if self.result.local is not None:
            yield self.result.local
            return
        with scratch_folder("result") as scratch:
            self.result.download(scratch)
            yield scratch


def finished_run(folder: Folder) -> FinishedRun:
    """The finished run in a folder.

    Raises:
        InputError: the folder contains no run, the run is not finished, or its result is missing.
    """
    record = existing_run(folder)
    status, name = record.get("status"), record.get("result")
    if status != "finished" or name not in ("adapter", "model"):
        raise InputError(
            f"{folder}: the run is not finished (status: {status}, step {record.get('step')} of "
            f"{record.get('total_steps')}); `finray train` with its recipe resumes it"
        )
    if not folder.exists(name):
        raise InputError(
            f"{folder}: the run's result folder {name}/ no longer exists; restore it, or train the "
            "run again with --fresh"
        )
    recipe = read_recipe(folder)[1]
    model = recipe.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("base"), str):
        raise InputError(
            f"{folder / RECIPE_FILE}: not a run's recipe: model.base is missing; restore the file"
        )
    return FinishedRun(folder, record, recipe, name)


def write_run(folder: Folder, record: Record) -> None:
    """Replace run.json. NaN and infinity become null, because JSON has neither."""
    numbered = {"format": RUN_FORMAT, **record} | {"format": RUN_FORMAT}
    text = json.dumps(_finite(numbered), indent=2, ensure_ascii=False, allow_nan=False)
    folder.write(RUN_FILE, _encode(text + "\n"))


def read_recipe(folder: Folder) -> tuple[str, Record]:
    """The run's recipe as text and as values; both are empty if there is none.

    Raises:
        InputError: recipe.yaml is not YAML.
    """
    content = read_if_there(folder, RECIPE_FILE)
    if content is None:
        return "", {}
    try:
        text = content.decode("utf-8")
        recipe = load_yaml(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{folder / RECIPE_FILE}: not a YAML file: {one_line(str(error))}; restore the file"
        ) from None
    return text, recipe if isinstance(recipe, dict) else {}


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; items of a list of mappings by their number."""
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list) and any(isinstance(item, dict) for item in values):
        items = {str(index): item for index, item in enumerate(values)}.items()
    else:
        return {prefix: values}
    parts: dict[str, Any] = {}
    for key, value in items:
        parts.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return parts


def read_metrics(folder: Folder) -> list[Record]:
    """The lines of metrics.jsonl, oldest first; empty if there is no file.

    A last line without its newline may be half-written; it is used if it is complete JSON.

    Raises:
        InputError: another line is not a JSON object; the message names it.
    """
    return [line for _, line in read_metric_lines(folder)]


def read_metric_lines(folder: Folder) -> list[tuple[str, Record]]:
    """As `read_metrics`, with the text of each line, which ends in a newline if it is complete."""
    lines = _read_lines(folder, METRICS_FILE)
    for number, (_, line) in enumerate(lines, start=1):
        place = f"{folder / METRICS_FILE}: line {number}"
        check_types(line, dict.fromkeys(line, float) | {"step": int}, place, needed=("step",))
    return lines


def read_samples(folder: Folder) -> list[Record]:
    """The lines of samples.jsonl; for errors see `read_metrics`."""
    return _read_records(folder, SAMPLES_FILE, "row")


def write_samples(folder: Folder, samples: Iterable[Record]) -> None:
    """Replace samples.jsonl."""
    _write_lines(folder, SAMPLES_FILE, samples)


def read_rollouts(folder: Folder) -> list[Record]:
    """The lines of rollouts.jsonl; for errors see `read_metrics`."""
    return _read_records(folder, ROLLOUTS_FILE, "step")


def write_rollouts(folder: Folder, rollouts: Iterable[Record]) -> None:
    """Replace rollouts.jsonl."""
    _write_lines(folder, ROLLOUTS_FILE, rollouts)


def _write_lines(folder: Folder, name: str, records: Iterable[Record]) -> None:
    lines = (
        json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        for record in records
    )
    folder.write(name, _encode("".join(lines)))


def list_runs(storage: Folder) -> list[tuple[str, Record]]:
    """(name, content of run.json as `read_listed` gives it) of every run in a storage, by name."""
    names = [name for name in storage.names() if name != PREPARED_FOLDER]
    records = ((name, read_listed(storage / name)) for name in names)
    return [(name, record) for name, record in records if record is not None]


def is_match(answer: str | None, reference: str | None) -> bool:
    """True if a sample's answer equals the reference, ignoring white space at both ends."""
    return answer is not None and reference is not None and answer.strip() == reference.strip()


def read_if_there(folder: Folder, name: str) -> bytes | None:
    """The content of a file; None if there is none.

    Raises:
        InputError: a local file cannot be read. An error of a store is passed on: it may pass.
    """
    try:
        return folder.read(name)
    except (FileNotFoundError, NotADirectoryError):  # a file beside the runs is not a run folder
        return None
    except OSError as error:
        if folder.local is None:
            raise
        raise InputError(
            f"{folder / name}: cannot be read: {reason(error)}; restore the file, or make it "
            "readable"
        ) from None


def _read_lines(folder: Folder, name: str) -> list[tuple[str, Record]]:
    """(text, content) of each line; the place of a line is its number in the file."""
    *complete, last = (read_if_there(folder, name) or b"").split(b"\n")
    records = [
        (f"{line.decode('utf-8', 'replace')}\n", require_record(line, f"{folder / name}:{number}"))
        for number, line in enumerate(complete, start=1)
        if line.strip()
    ]
    final = parse_record(last)
    return records if final is None else [*records, (last.decode("utf-8", "replace"), final)]


def _read_records(folder: Folder, name: str, key: str) -> list[Record]:
    """The lines of a file, each with a number under a key."""
    records = [record for _, record in _read_lines(folder, name)]
    for number, record in enumerate(records, start=1):
        check_types(record, {key: int}, f"{folder / name}: line {number}", needed=(key,))
    return records


def check_types(
    record: Record,
    types: Mapping[str, type],
    place: str,
    needed: Sequence[str] = (),
    remedy: str = "restore the file",
) -> None:
    """Check the types of a record's values; null is allowed, and an int is a float too.

    Args:
        record: a JSON object.
        types: the types by key.
        place: the file, and where in it, for messages.
        needed: keys that must not be absent or null.
        remedy: what to do about a value of another type.

    Raises:
        InputError: naming the place and the key.
    """
    for key, expected in types.items():
        value = record.get(key)
        allowed = (int, float) if expected is float else expected
        is_right = isinstance(value, allowed) and not isinstance(value, bool)
        if not is_right and (value is not None or key in needed):
            shown = f"{_TYPE_NAMES[expected]}, not {repr(value)[:80]}"
            raise InputError(f"{place}: {key}: expected {shown}; {remedy}")


def parse_record(line: bytes) -> Record | None:
    """Parse a JSON object; None for anything else, such as a half-written line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return None
    return value if isinstance(value, dict) else None


def require_record(content: bytes, where: str, remedy: str = "restore the file") -> Record:
    """A JSON object.

    Raises:
        InputError: the content is another one; `where` and `remedy` stand in the message.
    """
    record = parse_record(content)
    if record is None:
        excerpt = content[:80].decode("utf-8", "replace").strip()
        actual = f"found: {excerpt!r}" if excerpt else "and the file is empty"
        raise InputError(f"{where}: expected a JSON object, {actual}; {remedy}")
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _encode(text: str) -> bytes:
    """Encode as UTF-8; a lone surrogate, which a model can emit, becomes its JSON escape."""
    return text.encode("utf-8", "backslashreplace")
