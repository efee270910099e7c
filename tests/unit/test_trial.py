"""A trial in its slot's process, without Ray: what it reports, and how it ends."""

from pathlib import Path

import pytest
from guarded import carry_out, lines, recipe
from trials import reports_of, trial_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_what_nobody_heard_is_told_after_a_restart(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """The run is whole; whoever ran it heard of its first five steps only."""
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    carry_out(settings)
    known = lines(tmp_path / "run")
    with trial_of(settings, tmp_path / "sweep", heard=known[5]["tokens"]) as trial:
        *reports, end = reports_of(trial)
    told = [(one["tokens"], one["value"]) for one in reports]
    assert told == [(known[step]["tokens"], known[step]["loss"]) for step in range(6, 13)]
    assert reports[-1]["is_last"] and not reports[-2]["is_last"]
    assert end["status"] == "finished" and end["measures"]["loss"] == known[12]["loss"]


def test_what_is_told_late_can_still_prune(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings = recipe(tiny_model, chat_file, tmp_path, "run")
    carry_out(settings)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with trial_of(settings, tmp_path / "sweep") as trial:
        assert trial.next_report()["measures"]["step"] == 1
        trial.give_up()
        end = trial.next_report()
    assert end["status"] == "pruned"
    assert (tmp_path / "run" / "run.json").read_bytes() == before
