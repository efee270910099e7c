"""Format numbers: each file has one, and a newer one is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.records import checkpoint, run_folder
from finray.training.records.run_folder import read_run, write_run
from finray.tuning import sweep_folder
from finray.tuning.sweep_folder import read_sweep, write_sweep


def save(folder: Folder) -> None:
    staged = Path(folder.uri) / "staged"
    staged.mkdir()
    (staged / "weights").write_bytes(b"1")
    manifest = checkpoint.make_manifest(staged, 0, 1, {})
    checkpoint.publish(staged, folder / "step-00000001", 0, manifest)


FILES: dict[str, tuple[int, Callable[[Folder], object], Callable[[Folder], object]]] = {
    "run.json": (run_folder.RUN_FORMAT, lambda f: write_run(f, {"step": 3}), read_run),
    "sweep.json": (
        sweep_folder.SWEEP_FORMAT,
        lambda f: write_sweep(f, {"trials": []}),
        read_sweep,
    ),
    "step-00000001/rank-0.json": (checkpoint.FORMAT, save, checkpoint.choose),
}
"""By the file's name: its format, what writes it, and what reads it."""


@pytest.mark.parametrize("name", FILES)
def test_a_newer_format_is_refused(name: str, tmp_path: Path) -> None:
    latest, write, read = FILES[name]
    folder = Folder(str(tmp_path))
    write(folder)
    values = json.loads(folder.read(name))
    assert values["format"] == latest
    read(folder)
    folder.write(name, json.dumps({**values, "format": latest + 1}).encode())
    with pytest.raises(InputError, match=f"a newer finray wrote this file .format {latest + 1};"):
        read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_format_is_of_the_first(name: str, tmp_path: Path) -> None:
    _, write, read = FILES[name]
    folder = Folder(str(tmp_path))
    write(folder)
    values = json.loads(folder.read(name))
    del values["format"]
    folder.write(name, json.dumps(values).encode())
    assert read(folder) is not None


def test_a_rewritten_file_has_the_writers_format(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_run(folder, {"format": 0, "step": 3})
    assert (read_run(folder) or {})["format"] == run_folder.RUN_FORMAT
