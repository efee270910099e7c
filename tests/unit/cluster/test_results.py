"""Results that travel as text in a job's log."""

from pathlib import Path

import pytest

from finray.cluster.jobs.results import pack, unpack
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
