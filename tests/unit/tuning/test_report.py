"""The report page and the table of a sweep."""

import re
from typing import Any

import optuna
import pytest

from finray.cluster.screens.sweep import render_ending, render_sweep
from finray.training.common.storage import Folder
from finray.tuning.plots import importances, learning_curves
from finray.tuning.progress import Ending
from finray.tuning.report import gain, noise, render_report
from finray.tuning.sweep_folder import saved_share

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def row(number: int, state: str, **values: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": state,
        "settings": {"optim.learning_rate": 10.0**-number, "adapter.rank": 4},
        "values": None,
        "latest": None,
        "tokens": 0,
        "measures": {},
        "curve": [],
        "reason": None,
        "error": None,
        "started": None,
        "ended": f"2026-01-01T00:00:0{number}",
        **values,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "name": "s",
        "status": "finished",
        "error": None,
        "over": None,
        "settings": {"trials": 5, "pruning": {"kind": "auto"}},
        "objectives": [{"metric": "eval_loss", "mode": "min"}],
        "prunes": True,
        "first_rung": 100,
        "trial_tokens": 1000,
        "excluded": {"count": 0, "first": []},
        "wall_seconds": 61.0,
        "best": [2],
        "result": "adapter",
        "trials": [
            row(1, "finished", values=[2.0], tokens=1000, curve=[[100, 3.0], [1000, 2.0]]),
            row(2, "finished", values=[1.0], tokens=1000, curve=[[100, 2.0], [1000, 1.0]]),
            row(3, "pruned", latest=9.0, tokens=100, curve=[[100, 9.0]], reason="pruned at 100"),
            row(4, "failed", error="<script>alert(1)</script>"),
        ],
    }


@pytest.fixture
def study(record: dict[str, Any]) -> optuna.Study:
    made = optuna.create_study()
    for row in record["trials"]:
        trial = made.ask()
        trial.suggest_float("optim.learning_rate", 1e-5, 1.0, log=True)
        trial.suggest_categorical("adapter.rank", [4, 8])
        for step, value in row["curve"]:
            trial.report(value, step)
        if row["values"]:
            made.tell(trial, row["values"])
        else:
            made.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return made


def test_what_settings_explain_needs_ten_trials() -> None:
    study = optuna.create_study()
    for number in range(10):
        assert importances(study) == []
        trial = study.ask()
        rate = trial.suggest_float("optim.learning_rate", 1e-5, 1.0)
        trial.suggest_categorical("adapter.rank", [4, 8])
        study.tell(trial, rate + number * 1e-9)
    [(_, shares)] = importances(study)
    assert [key for key, _ in shares] == ["optim.learning_rate", "adapter.rank"]
    assert sum(share for _, share in shares) == pytest.approx(1)


def test_the_page_is_self_contained(record: dict[str, Any], study: optuna.Study) -> None:
    page = render_report(study, record)
    assert not re.search(r'<(script|link|img)[^>]+(src|href)=(?!"data:)', page)
    titles = ("Held-out loss of each trial", "Best so far", "optim.learning_rate")
    assert [title for title in titles if f"<h3>{title}" not in page] == []
    assert "each setting explains" not in page, "of so few trials"
    assert "trial 3 (pruned)" in page
    assert '<tr class="best">\n<td>2</td>' in page
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    # 2100 tokens instead of 3000
    assert '<span class="value">30.0%</span>' in page and saved_share(record) == pytest.approx(0.3)
    finished = [row for row in record["trials"] if row["state"] == "finished"]
    assert saved_share({**record, "trial_tokens": 1200, "trials": finished}) == 0, "none is pruned"


def test_a_page_without_a_result(record: dict[str, Any]) -> None:
    record.update(trials=[record["trials"][3]], best=[], status="failed")
    assert "1 failed" in render_report(optuna.create_study(), record)


def test_the_table_begins_with_the_best(record: dict[str, Any], tmp_path: Any) -> None:
    lines = render_sweep(record, Folder(str(tmp_path))).splitlines()
    assert lines[0] == "sweep s finished: 2 finished, 1 pruned, 1 failed; 1m01s"
    assert lines[1].split() == ["trial", "state", "eval_loss", "learning_rate", "rank", "tokens"]
    assert [line.split()[0] for line in lines[2:6]] == ["*2", "1", "3", "4"]
    assert lines[2].split() == ["*2", "finished", "1", "0.01", "4", "1k"]


def test_the_line_of_an_ended_trial(record: dict[str, Any]) -> None:
    text = render_ending(Ending(3, "pruned", "eval_loss 9"), record)
    assert text == "trial 3 pruned: eval_loss 9 (best: 1 of trial 2; 4 of at most 5)"


def test_the_table_of_a_population_shows_parents(record: dict[str, Any], tmp_path: Any) -> None:
    record["settings"]["pruning"] = {"kind": "pbt"}
    record["trials"][0].update(state="pruned", values=None, reason="replaced by trial 2")
    record["trials"][1].update(parent={"trial": 1, "tokens": 100}, curve=[[1000, 1.0]])
    lines = render_sweep(record, Folder(str(tmp_path))).splitlines()
    assert lines[1].split()[-1] == "from" and lines[2].split()[-1] == "1"
    text = render_ending(Ending(1, "pruned", "replaced"), record)
    assert text.endswith("1 of 5 members finished)")
    curves = learning_curves(record)
    assert curves is not None and curves.lines[-1].style == "main", "the best is drawn last"
    assert [point[2:] for point in curves.lines[-1].readout] == [
        ("100", "3.000"),
        ("1,000", "1.000"),
    ]


def test_the_gain_over_the_rule_of_thumb_and_its_noise(record: dict[str, Any]) -> None:
    assert gain(record) == "not known, as the rule of thumb's trial did not finish"
    record["trials"][0]["number"] = 0
    assert gain(record) == "-1.000 over the rule of thumb: 2.000 (trial 0) to 1.000 (trial 2)"
    assert noise(record).startswith("not measured; retrain")
    runs = [{"seed": seed} for seed in (1, 2, 3)]
    spread = {"eval_loss": {"mean": 1.1, "deviation": 0.05}}
    record["retrained"] = {"runs": runs, "spread": spread}
    assert noise(record) == "the best settings with 3 seeds: 1.100 ± 0.05"
    record["best"] = [0]
    assert gain(record) == "none: the rule of thumb is the best"


def test_fifty_trials_stay_below_a_megabyte(record: dict[str, Any]) -> None:
    """Each with a hundred measurements and four settings."""
    keys = ("optim.learning_rate", "optim.warmup_ratio", "adapter.alpha", "adapter.dropout")
    study = optuna.create_study()
    rows = []
    for number in range(50):
        trial = study.ask()
        settings = {key: trial.suggest_float(key, 1e-5, 1.0, log=True) for key in keys}
        study.tell(trial, 1.0 / (number + 1))
        curve = [[tokens, 1 + 1 / tokens] for tokens in range(1000, 101_000, 1000)]
        made = row(number, "finished", values=[1.0 / (number + 1)], tokens=100_000, curve=curve)
        rows.append({**made, "settings": settings})
    record.update(trials=rows, best=[49])
    page = render_report(study, record)
    assert len(page.encode()) < 1_000_000
    assert "Held-out loss of each trial" in page and page.count('class="plot"') == 6


def test_each_of_several_objectives_has_a_figure_of_its_own(record: dict[str, Any]) -> None:
    """Together they would be too long for one."""
    record["objectives"].append({"metric": "eval_token_f1", "mode": "max"})
    for trial in record["trials"]:
        trial["values"] = trial["values"] and [*trial["values"], 0.5]
    page = render_report(optuna.create_study(directions=["minimize", "maximize"]), record)
    figures = re.findall(r'<span class="label">(.*?)</span><span class="value">(.*?)</span>', page)
    assert ("Best, trial 2: eval_loss", "1") in figures
    assert ("Best, trial 2: eval_token_f1", "0.5") in figures
    assert '<span class="x" style="left:0.0%">learning_rate' not in page
