"""Prepared data that changes under a run: it is named and prepared again, and the run goes on."""

from pathlib import Path

import pytest
from support.guarded import assert_same, recipe
from support.recorded import RecordedProgress

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.prepared import Prepared
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records.run_folder import Record, existing_run
from finray.training.run import prepare_data, run_folder, run_prepared

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def flip(prepared: Prepared) -> Path:
    """Change a bit of a token; returns the file."""
    file = Path(prepared.files.file(prepared.manifest.train.files[0]))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def go(settings: Recipe, prepared: Prepared, progress: RecordedProgress, until: int) -> Record:
    run_prepared(settings, prepared, InProcessLauncher(), progress, until=until)
    return existing_run(run_folder(settings))


@pytest.mark.long
def test_a_run_goes_on_with_rebuilt_data(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    """Damaged before its first read, and again after a stop."""
    whole, run = (recipe(tiny_model, chat_file, tmp_path, name) for name in ("whole", "run"))
    progress = RecordedProgress()
    go(whole, prepare_data(whole), progress, 99)
    assert progress.statuses.pop(0) == "rehearsing on a small copy of the model"
    assert progress.statuses == []
    for until in (6, 99):
        prepared = prepare_data(run)
        file = flip(prepared)
        record = go(run, prepared, progress, until)
        assert progress.statuses.pop(0).startswith(f"{file}: this file of the prepared data is mis")
        assert f"{file}: damaged: this file" in record["restarts"][-1]["reason"]
        progress.statuses.clear()
    assert record["status"] == "finished"
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_data_that_cannot_be_rebuilt_ends_the_run(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(chat_file.read_bytes())
    run = recipe(tiny_model, data, tmp_path, "run")
    prepared = prepare_data(run)
    file = flip(prepared)
    data.write_bytes(chat_file.read_bytes() + b'{"messages": []}\n')
    with pytest.raises(InputError, match="cannot be prepared again: the data changed"):
        go(run, prepared, RecordedProgress(), 99)
    assert Folder(str(file.parent)).names() == ["000000.parquet.damaged"]
    assert existing_run(run_folder(run))["status"] == "failed"
