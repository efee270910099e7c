"""note.json: what a person writes about a run, beside what the run itself records.

run.json has one writer at a time, which may be a worker; a note is a file of its own.
"""

import json
from dataclasses import asdict, dataclass

from ..common.errors import InputError, writing
from ..common.storage import Folder
from .run_folder import RUN_FILE, Record, list_runs, parse_record, read_if_there

NOTE_FILE = "note.json"


@dataclass(frozen=True)
class Note:
    """A person's text about a run, and tags beside those of its recipe."""

    text: str = ""
    tags: tuple[str, ...] = ()


def read_note(folder: Folder) -> Note:
    """The note in a run's folder; an empty one where there is none.

    Raises:
        InputError: note.json is not as `write_note` writes it, or cannot be read.
    """
    content = read_if_there(folder, NOTE_FILE)
    if content is None:
        return Note()
    record = parse_record(content)
    text, tags = (record or {}).get("text"), (record or {}).get("tags")
    is_list = isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)
    if not isinstance(text, str) or not is_list:
        raise InputError(
            f"{folder / NOTE_FILE}: expected an object with text and tags; write the note again, "
            "finray runs note RUN TEXT"
        )
    return Note(text, tuple(tags or ()))


def write_note(folder: Folder, note: Note) -> None:
    """Write or replace a run's note.

    Raises:
        InputError: the folder holds no run, or cannot be written.
        RunError: the disk is full.
    """
    if not folder.exists(RUN_FILE):
        raise InputError(f"{folder} holds no run: there is no {RUN_FILE}; name a run's folder")
    text = json.dumps(asdict(note), indent=2, ensure_ascii=False)
    with writing(folder / NOTE_FILE, "make the folder writable"):
        folder.write(NOTE_FILE, text.encode("utf-8", "backslashreplace") + b"\n")


def noted_runs(storage: Folder) -> list[tuple[str, Record]]:
    """As `list_runs`, with a person's text under `note` and all tags under `tags`.

    A damaged note is none; what to do about it is under `problem`.
    """
    runs = []
    for name, record in list_runs(storage):
        note, problem = Note(), record.get("problem")
        try:
            note = read_note(storage / name)
        except InputError as error:
            problem = problem or str(error)
        tags = list(dict.fromkeys([*(record.get("tags") or ()), *note.tags]))
        own = {"note": note.text, "tags": tags, **({"problem": problem} if problem else {})}
        runs.append((name, record | own))
    return runs
