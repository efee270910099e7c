"""Runs side by side: what differs, the answers that tell them apart, plots and the page."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.stored_runs import stored_run

from finray.cluster.cli.main import main
from finray.cluster.screens.comparison import render_comparison
from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.records.charts import overlay
from finray.training.records.comparison import Comparison, compare_runs
from finray.training.records.comparison_page import matched, render_page

SAMPLES = [("same", "1", "1"), ("<|im_start|>user\n<b>apart", "2", "2"), ("neither", "3", "?")]


def two_runs(tmp_path: Path) -> Comparison:
    for name, rate, answer in (("first", 1e-4, "wrong"), ("second", 3e-4, "2")):
        samples = [
            {"row": row, "prompt": prompt, "reference": reference, "after": after}
            for row, (prompt, reference, after) in enumerate(SAMPLES)
        ]
        samples[1]["after"] = answer
        stored_run(
            tmp_path,
            name,
            recipe={
                "optim": {"learning_rate": rate, "epochs": 2},
                "data": {"train": [{"p": name}], "eval": [] if name == "first" else [{"p": "e"}]},
            },
            metrics={"eval_loss": 0.5 + rate * 1000, "loss": 0.25},
            lines=[{"step": step, "loss": 8.0 / step**2} for step in (1, 2, 4)],
            samples=samples,
            versions={"torch": "2.13.0" if name == "first" else "2.14.0"},
        )
    return compare_runs([Folder(str(tmp_path / name)) for name in ("first", "second")])


def test_only_what_differs_is_named(tmp_path: Path) -> None:
    compared = two_runs(tmp_path)
    assert compared.settings == {
        "optim.learning_rate": [1e-4, 3e-4],
        "data.train.0.p": ["first", "second"],
        "data.eval.0.p": [None, "e"],
    }
    assert compared.inputs == {"torch (version)": ["2.13.0", "2.14.0"]}
    assert compared.metrics == {"eval_loss": [0.6, 0.8], "loss": [0.25, 0.25]}
    assert compared.curves["loss"] == [[(1.0, 8.0), (2.0, 2.0), (4.0, 0.5)]] * 2


def test_answers_that_tell_the_runs_apart_come_first(tmp_path: Path) -> None:
    compared = two_runs(tmp_path)
    assert [item.prompt for item in compared.answers] == [SAMPLES[n][0] for n in (1, 0, 2)]
    assert compared.answers[0].matches == [False, True]


def test_the_text(tmp_path: Path) -> None:
    text = render_comparison(two_runs(tmp_path), rows=1)
    assert re.search(r"held-out loss +0\.600 +0\.800 \(\+0\.200\)", text)
    assert re.search(r"answers that match +1 of 3 +2 of 3", text)
    assert "optim.learning_rate  0.0001   0.0003" in text
    assert "Loss, log scale" in text and text.count("|*") == 0
    assert "B ✓        2" in text and "2 more prompts" in text


@pytest.mark.parametrize("width", [60, 80])
def test_the_text_fits_a_terminal(tmp_path: Path, width: int) -> None:
    for name in ("first", "second"):
        path = f"/a/folder/that/is/very/long/and/shared/by/all/of/them/rows-{name}.jsonl"
        metric = {"file": "score.py:f", "source": f"{'#' * 60}\ndef f(): {name}\n"}
        recipe = {"data": {"train": [{"path": path}]}, "eval": {"metrics": [metric]}}
        stored_run(tmp_path, name, recipe=recipe)
    compared = compare_runs([Folder(str(tmp_path / name)) for name in ("first", "second")])
    text = render_comparison(compared, 0, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "first.jsonl" in text and "econd.jsonl" in text, "what differs is shown"
    first, second = compared.settings["eval.metrics.0.source"]
    assert first != second and first.startswith("sha256 ") and len(first) < 20


def test_a_run_is_measured_by_the_prompts_that_it_answered(tmp_path: Path) -> None:
    two_runs(tmp_path)
    first = {"row": 0, "prompt": "same", "reference": "1", "after": "1"}
    for name, samples in (("few", [first]), ("none", [])):
        stored_run(tmp_path, name, samples=samples)
    folders = [Folder(str(tmp_path / name)) for name in ("first", "second", "few", "none")]
    assert matched(compare_runs(folders))[2:] == ["1 of 1", "–"]


def test_the_page_escapes_and_folds(tmp_path: Path) -> None:
    page = render_page(two_runs(tmp_path))
    assert "&lt;b&gt;apart" in page and "<b>apart" not in page
    assert '<span class="special" title="&lt;|im_start|&gt;">' in page
    assert page.count("<polyline") == 2, "two runs' losses"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_runs(tmp_path)
    words = ["runs", "compare", "first", "second", "--storage", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["first", "second"]
    assert main([*words, "--page", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Folder, "write", refuse)
    storage, page = ["--storage", str(tmp_path)], str(tmp_path / "page.html")
    for command, place in (
        (["runs", "compare", "first", "second", *storage, "--page", page], f"--page {page}"),
        (["runs", "note", "first", "hi", *storage], f"{tmp_path}/first/note.json"),
        (["report", str(tmp_path / "first")], f"{tmp_path}/first/report.html"),
    ):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"finray: {place}: cannot be written: Read-only file system; ")
        assert err.count("\n") == 1 and not out


def test_a_damaged_note_is_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = stored_run(tmp_path, "first") / "note.json"
    note.write_text("{")
    storage = ["--storage", str(tmp_path)]
    assert main(["runs", *storage]) == 0
    shown = capsys.readouterr()
    assert "finray runs note RUN TEXT" in shown.err and "first  finished" in shown.out
    assert main(["runs", "note", "first", "--tag", "x", *storage]) == 2
    assert "finray runs note RUN TEXT" in capsys.readouterr().err
    assert main(["runs", "note", "first", "too short", *storage]) == main(["runs", *storage]) == 0
    assert "too short" in capsys.readouterr().out
    assert main(["runs", "--storage", f"{tmp_path}/none"]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}/none yet\n"


def test_refused(tmp_path: Path) -> None:
    two_runs(tmp_path)
    folder = Folder(str(tmp_path / "first"))
    for folders, message in (([folder], "expected 2 to 6 runs"), ([folder] * 2, "is given twice")):
        with pytest.raises(InputError, match=message):
            compare_runs(folders)


@pytest.mark.parametrize(
    ("values", "is_log", "ticks"),
    [
        ([1.0, 9.0], False, ["0", "2", "4", "6", "8", "10"]),
        ([0.5, 8.0], True, ["0.5", "1", "2", "5", "10"]),
        ([1e-6, 1.0], True, [f"1e-{n}" for n in range(6, 0, -1)] + ["1"]),
        ([0.0, 100.0], False, ["0", "50", "100"]),
    ],
)
def test_the_axis(values: list[float], is_log: bool, ticks: list[Any]) -> None:
    chart = overlay("x", [("a", list(enumerate(values)))], format="loss")
    assert chart is not None and chart.is_log == is_log
    assert len(chart.y_ticks) == len(ticks)
    assert [float(tick.label) for tick in chart.y_ticks] == pytest.approx([float(t) for t in ticks])
    assert chart.y_ticks[0].at == 0 and chart.y_ticks[-1].at == 100
    share = overlay("x", [("a", list(enumerate(values)))], format="percent")
    assert share is not None and not share.is_log
