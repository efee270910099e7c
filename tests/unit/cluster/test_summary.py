"""The summary of a run: its gain and its folder, in 80 columns."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from finray.cluster.screens.progress import evaluation_text
from finray.cluster.screens.summary import WIDTH, render_summary, shorten
from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.records.labels import key_metrics
from finray.training.records.run_folder import write_run, write_samples


def make_run(tmp_path: Path, **record: Any) -> Folder:
    folder = Folder(str(tmp_path / "demo")).create()
    write_run(
        folder,
        {"status": "finished", "name": "demo", "step": 400, "total_steps": 400, "tokens": 12345,
         "wall_seconds": 130, **record},
    )  # fmt: skip
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Folder:
    folder = make_run(
        tmp_path,
        before={"eval_loss": 2.5, "exact_match": 0.125},
        metrics={"loss": 0.4, "eval_loss": 0.5, "exact_match": 0.875},
        result="adapter",
    )
    (folder / "adapter").create()
    folder.write("report.html", b"")
    samples = [
        {"row": n, "prompt": f"question {n} " + "日本語 " * 40, "reference": "42",
         "before": "\x1b[2Jwipe\nout", "after": "42" if n else ""}
        for n in range(5)
    ]  # fmt: skip
    write_samples(folder, samples)
    return folder


def test_gains_samples_and_places(full: Folder) -> None:
    text = render_summary(full)
    assert text.startswith("demo finished: 400 steps, 12,345 tokens, 2m10s\n")
    assert re.search(r"exact match +12\.5% +87\.5% +\+75\.0\n", text)
    assert re.search(r"held-out loss +2\.500 +0\.500 +-2\.000\n", text)
    assert [n for n in range(5) if f"question {n}" in text] == [0, 1, 2]
    assert text.count("✓") == 2
    assert "tuned      (empty)\n" in text
    assert f"adapter    {full}/adapter" in text
    assert f"report     {full}/report.html" in text
    assert "metrics.jsonl" not in text, "what is not there is not named"


def test_measures_of_answers_of_the_recipe_are_shown(tmp_path: Path) -> None:
    after = {"eval_token_f1": 0.5, "eval_short": 2.0, "eval_exact_match": 0.1, "eval_loss": 1.0}
    others = {"eval_entropy": 2.0, "eval_reward/short": 1.0, "eval_idle_experts": 0.0}
    run = make_run(tmp_path, before={"eval_short": 3.0}, metrics={**after, **others})
    text = render_summary(run)
    assert re.search(r"held-out short +3\.000 +2\.000 +-1\.000\n", text)
    assert re.search(r"held-out token F1 +– +50\.0%\n", text)
    shown = "held-out exact match 10.0%  held-out short 2.000  held-out token F1 50.0%"
    assert evaluation_text({"step": 3, **after, **others}) == (
        f"step 3  held-out loss 1.000  {shown}"
    )
    assert key_metrics(after, {"exact_match": 0.1})[:2] == ["exact_match", "eval_short"]


def test_text_of_a_model_cannot_control_the_terminal(full: Folder) -> None:
    text = render_summary(full)
    assert "\x1b" not in text
    assert "[2Jwipe out" in text


def test_it_fits_80_columns(full: Folder) -> None:
    lines = [line for line in render_summary(full).splitlines() if str(full) not in line]
    assert max(map(cell_len, lines)) <= WIDTH
    assert any(line.endswith("…") for line in lines)


def test_colour_changes_no_word(full: Folder) -> None:
    coloured = render_summary(full, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == render_summary(full)


def test_without_held_out_data(tmp_path: Path) -> None:
    text = render_summary(make_run(tmp_path, metrics={"loss": 0.25}))
    assert text == "demo finished: 400 steps, 12,345 tokens, 2m10s\n\n  training loss 0.250"


def test_a_failed_run_shows_its_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path, status="failed", step=43, error="worker 1 died\n\nout of memory")
    text = render_summary(folder)
    assert text.startswith("demo failed: step 43 of 400, ")
    assert "\n\n  worker 1 died\n\n  out of memory" in text


def test_base_not_measured(tmp_path: Path) -> None:
    text = render_summary(make_run(tmp_path, metrics={"eval_loss": 0.5}))
    assert re.search(r"held-out loss +– +0\.500$", text)


def test_no_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        render_summary(Folder(str(tmp_path)))


def test_shorten_counts_columns_not_letters() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("x" * 11, 10) == "x" * 9 + "…"
    assert cell_len(shorten("日" * 30, 10)) <= 10
