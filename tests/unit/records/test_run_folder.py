"""run_folder: written data is read back, and errors name the file and line."""

import json
import math
from pathlib import Path

import pytest

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.records.run_folder import (
    RUN_FORMAT,
    is_match,
    list_runs,
    read_metrics,
    read_run,
    read_samples,
    write_run,
    write_samples,
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run")).create()


def test_run_record_comes_back(folder: Folder) -> None:
    record = {"status": "running", "step": 3, "restarts": [{"step": 1, "reason": "größe"}]}
    write_run(folder, record)
    assert read_run(folder) == {"format": RUN_FORMAT, **record}


def test_numbers_json_lacks_become_null(folder: Folder) -> None:
    write_run(folder, {"metrics": {"loss": math.nan}, "list": [math.inf, 1.5]})
    text = folder.read("run.json").decode()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"found {name}"))
    assert strict == {"format": RUN_FORMAT, "metrics": {"loss": None}, "list": [None, 1.5]}


def test_no_run_is_none(folder: Folder) -> None:
    assert read_run(folder) is None
    assert read_run(folder / "nowhere") is None
    assert read_metrics(folder) == []
    assert read_samples(folder) == []


def test_damaged_run_names_its_file(folder: Folder) -> None:
    folder.write("run.json", b"[1, 2]")
    with pytest.raises(InputError, match=r"run\.json: expected a JSON object, found: '\[1, 2\]'"):
        read_run(folder)


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', '{"text": "ü'.encode()[:-1], b"12", b""])
def test_torn_last_line_is_left_out(folder: Folder, torn: bytes) -> None:
    folder.write("metrics.jsonl", b'{"step": 1}\n' + torn)
    assert read_metrics(folder) == [{"step": 1}]


def test_whole_last_line_counts_without_its_newline(folder: Folder) -> None:
    folder.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}')
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]


def test_damaged_line_is_named(folder: Folder) -> None:
    folder.write("metrics.jsonl", b'{"step": 1}\n\n{"step": \n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: expected a JSON object"):
        read_metrics(folder)


def test_damaged_last_line_with_its_newline_is_an_error(folder: Folder) -> None:
    folder.write("metrics.jsonl", b'{"step": 1}\n{"step": \n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2:"):
        read_metrics(folder)


def test_samples_come_back_whatever_their_text(folder: Folder) -> None:
    samples = [
        {"row": 0, "prompt": "a\nb\u2028c", "reference": "日本", "before": None, "after": "\ud800"}
    ]
    write_samples(folder, samples)
    assert read_samples(folder) == samples
    assert folder.read("samples.jsonl").count(b"\n") == 1


def test_list_runs_takes_runs_only(tmp_path: Path) -> None:
    storage = Folder(str(tmp_path))
    write_run(storage / "b", {"step": 2})
    write_run(storage / "a", {"step": 1})
    write_run(storage / "prepared", {"step": 9})
    (storage / "empty").create()
    (tmp_path / "notes.txt").write_text("no folder")
    assert list_runs(storage) == [
        ("a", {"format": RUN_FORMAT, "step": 1}),
        ("b", {"format": RUN_FORMAT, "step": 2}),
    ]
    assert list_runs(storage / "missing") == []


def test_match_is_exact_but_for_white_space_around() -> None:
    assert is_match(" 42\n", "42")
    assert not is_match("42.", "42")
    assert not is_match(None, "42")
    assert not is_match("", None)
