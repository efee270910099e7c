"""The files of a run's folder: their names, and how each is read and written."""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..common.errors import InputError
from ..common.storage import Folder
from ..common.versions import check_format
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

Record = dict[str, Any]
"""A JSON object."""


def read_run(folder: Folder) -> Record | None:
    """run.json as a record; None if the folder contains no run.

    Raises:
        InputError: run.json is not a JSON object, or a newer finray wrote it.
    """
    content = _read(folder, RUN_FILE)
    if content is None:
        return None
    place = folder / RUN_FILE
    record = _parse(content, f"{place}")
    check_format(record, RUN_FORMAT, place)
    return record


def existing_run(folder: Folder) -> Record:
    """run.json of a run that must exist.

    Raises:
        InputError: the folder contains no run, or run.json is not a JSON object.
    """
    run = read_run(folder)
    if run is None:
        raise InputError(f"{folder} holds no run: there is no {RUN_FILE}")
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
        with tempfile.TemporaryDirectory(prefix="finray-") as scratch:
            self.result.download(Path(scratch))
            yield Path(scratch)


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
        raise InputError(f"{folder}: the run's result folder {name}/ no longer exists")
    return FinishedRun(folder, record, read_recipe(folder)[1], name)


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
    try:
        text = folder.read(RECIPE_FILE).decode("utf-8")
        recipe = load_yaml(text)
    except FileNotFoundError:
        return "", {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / RECIPE_FILE}: not a YAML file: {error}") from None
    return text, recipe if isinstance(recipe, dict) else {}


def read_metrics(folder: Folder) -> list[Record]:
    """The lines of metrics.jsonl, oldest first; empty if there is no file.

    A last line without its newline may be half-written; it is used if it is complete JSON.

    Raises:
        InputError: another line is not a JSON object; the message names it.
    """
    return _read_lines(folder, METRICS_FILE)


def read_samples(folder: Folder) -> list[Record]:
    """The lines of samples.jsonl; for errors see `read_metrics`."""
    return _read_lines(folder, SAMPLES_FILE)


def write_samples(folder: Folder, samples: Iterable[Record]) -> None:
    """Replace samples.jsonl."""
    _write_lines(folder, SAMPLES_FILE, samples)


def read_rollouts(folder: Folder) -> list[Record]:
    """The lines of rollouts.jsonl; for errors see `read_metrics`."""
    return _read_lines(folder, ROLLOUTS_FILE)


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
    """(name, content of run.json) of every run in a storage, sorted by name.

    Raises:
        InputError: a run.json is not a JSON object.
    """
    names = [name for name in storage.names() if name != PREPARED_FOLDER]
    records = ((name, read_run(storage / name)) for name in names)
    return [(name, record) for name, record in records if record is not None]


def is_match(answer: str | None, reference: str | None) -> bool:
    """True if a sample's answer equals the reference, ignoring white space at both ends."""
    return answer is not None and reference is not None and answer.strip() == reference.strip()


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except (FileNotFoundError, NotADirectoryError):  # a file beside the runs is not a run folder
        return None


def _read_lines(folder: Folder, name: str) -> list[Record]:
    *complete, last = (_read(folder, name) or b"").split(b"\n")
    records = [
        _parse(line, f"{folder / name}:{number}")
        for number, line in enumerate(complete, start=1)
        if line.strip()
    ]
    final = parse_record(last)
    return records if final is None else [*records, final]


def parse_record(line: bytes) -> Record | None:
    """Parse a JSON object; None for anything else, such as a half-written line."""
    try:
        value = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict) else None


def _parse(content: bytes, where: str) -> Record:
    record = parse_record(content)
    if record is None:
        excerpt = content[:80].decode("utf-8", "replace").strip()
        raise InputError(f"{where}: expected a JSON object, found: {excerpt!r}")
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
