"""Results that travel as text in a job's log."""

from pathlib import Path

import pytest

from finray.cluster.jobs.results import pack, unpack
from finray.training.common.errors import InputError
from finray.training.common.storage import Folder


def test_results_are_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    weights = bytes(range(256)) * 1000
    for name, content in {
        "run.json": b"{}",
        "adapter/weights.bin": weights,
        "checkpoints/large.bin": b"stays",
    }.items():
        (run / name).write_bytes(content)
    assert pack(Folder(str(run))) == 0
    log = f"a line of Ray's\n{capsys.readouterr().out}a line at the end\n"
    target = tmp_path / "here"
    assert unpack(log, target) == ["adapter/weights.bin", "run.json"]
    assert (target / "adapter" / "weights.bin").read_bytes() == weights


def test_a_log_without_a_whole_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    pack(Folder(str(tmp_path)))
    cut_off = capsys.readouterr().out.rpartition("\n")[0].rpartition("\n")[0]
    assert unpack(cut_off, tmp_path / "here") is None
    assert unpack("nothing", tmp_path / "here") is None
    assert unpack("finray-pack-begin\n*\nfinray-pack-end", tmp_path / "here") is None


def test_no_run_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(Folder(str(tmp_path / "absent"))) == 2
    assert "holds no run yet" in capsys.readouterr().err


def test_what_is_in_the_way_leaves_everything_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link, a file for a folder, a folder for a file; files of an earlier fetch are replaced."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    for name in ("run.json", "adapter/weights.bin"):
        (run / name).write_text("new", encoding="utf-8")
    assert pack(Folder(str(run))) == 0
    log = capsys.readouterr().out
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "weights.bin").write_text("mine", encoding="utf-8")
    ways = {
        "link": lambda target: (target / "adapter").symlink_to(mine),
        "broken": lambda target: (target / "run.json").symlink_to("nowhere"),
        "file": lambda target: (target / "adapter").write_text("a file", encoding="utf-8"),
        "folder": lambda target: (target / "adapter/weights.bin").mkdir(parents=True),
    }
    for name, put in ways.items():
        target = tmp_path / name
        target.mkdir()
        put(target)
        before = sorted(target.rglob("*"))
        with pytest.raises(InputError, match="is in the way, and nothing is fetched"):
            unpack(log, target)
        assert sorted(target.rglob("*")) == before
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match="taken is in the way"):
        unpack(log, tmp_path / "taken")
    assert (mine / "weights.bin").read_text(encoding="utf-8") == "mine"
    here = tmp_path / "here"
    (here / "adapter").mkdir(parents=True)
    (here / "run.json").write_text("old", encoding="utf-8")
    (here / "notes.txt").write_text("mine", encoding="utf-8")
    assert unpack(log, here) == ["adapter/weights.bin", "run.json"]
    files = {path.name: path.read_text("utf-8") for path in here.rglob("*") if path.is_file()}
    assert files == {"weights.bin": "new", "run.json": "new", "notes.txt": "mine"}
    assert not list(tmp_path.glob(".*"))
