"""finray runs: one line per run, silent and unreadable runs marked, and the same as JSON."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.stored_runs import stored_run

import finray
from finray.cluster.cli.main import main
from finray.cluster.screens.runs import render_runs

NOW = datetime(2026, 5, 2, 12, 0, tzinfo=UTC)


def ago(**time: float) -> str:
    return (NOW - timedelta(**time)).strftime("%Y-%m-%dT%H:%M:%SZ")


def run(**record: Any) -> dict[str, Any]:
    return {"status": "finished", "method": "sft", "step": 400, "total_steps": 400, **record}


def test_columns_and_order() -> None:
    metrics = {"loss": 0.47, "eval_loss": 0.552, "exact_match": 0.871}
    runs = [
        ("a-new", run(started_at=ago(hours=1), status="failed", step=7)),
        ("b-old", run(started_at=ago(days=2), metrics=metrics, tokens=1_536_000)),
    ]
    header, old, new = render_runs(runs, as_json=False, now=NOW).splitlines()
    assert (
        header.split() == "name status method step loss eval loss match tokens started".split()
    ), "no run has a reward"
    assert old.split() == "b-old finished sft 400/400 0.470 0.552 87.1% 1.54M 2d00h ago".split()
    assert new.split() == "a-new failed sft 7/400 – – – – 1h00m ago".split()
    assert len({len(line) for line in (header, old, new)}) == 1, "the columns line up"


def test_a_reward_or_a_preference_has_its_column() -> None:
    runs = [
        ("policy", run(metrics={"eval_reward": 0.75, "eval_reward_accuracy": 0.5})),
        ("pairs", run(metrics={"eval_loss": 0.3, "eval_reward_accuracy": 0.9})),
    ]
    pairs, policy = render_runs(runs, as_json=False, now=NOW).splitlines()[1:]
    assert " 0.750 " in policy and "90.0%" in pairs


def test_a_heading_sorts_its_column_and_nothing_stands_twice() -> None:
    runs = [
        ("b", run(started_at=ago(hours=2), metrics={"eval_loss": 2.0, "exact_match": 0.5})),
        ("a", run(started_at=ago(hours=1), metrics={"eval_loss": 1.0, "exact_match": 0.1})),
        ("c", run(metrics={"reward": 0.1}, tags=["x"], note="late")),
    ]

    def order(sort: str) -> list[str]:
        header, *rows = render_runs(runs, as_json=False, now=NOW, sort=sort).splitlines()
        assert header.count("note") == header.count("tags") == 1
        return [row.split()[0] for row in rows]

    assert order("eval loss") == order("eval_loss") == ["a", "b", "c"]
    assert order("match") == ["b", "a", "c"] == order("started")
    assert order("reward")[0] == order("tags")[0] == order("note")[0] == "c", "a metric, words"


def test_words_are_cut_to_a_terminal_and_numbers_never() -> None:
    name = "support-" + "qwen3-" * 6 + "lr-3e-4"
    metrics = {"loss": 0.47, "eval_loss": 0.552}
    long = run(metrics=metrics, tokens=123, note="warm-up too short " * 3, tags=["a", "b"])
    whole = render_runs([(name, long)], as_json=False, now=NOW)
    assert name in whole and max(map(len, whole.splitlines())) > 120
    table = render_runs([(name, long)], as_json=False, now=NOW, width=140)
    assert max(map(len, table.splitlines())) <= 140
    assert all(part in table for part in ("400/400", "0.552", name, "warm-up", "…"))


@pytest.mark.parametrize("width", [110, 100, 80, 60, 40])
@pytest.mark.parametrize("name", ["short", "support-" + "qwen3-" * 6 + "lr-3e-4"])
def test_a_narrow_terminal_has_no_line_that_wraps(name: str, width: int) -> None:
    record = run(metrics={"loss": 0.47, "eval_loss": 0.552}, tokens=1_536_000)
    tagged = record | {"tags": ["baseline", "lora-r16"], "note": "warm-up too short"}
    table = render_runs([(name, tagged), ("b", record)], as_json=False, now=NOW, width=width)
    header, *rows = table.splitlines()
    assert max(map(len, table.splitlines())) <= width
    headings = set(header.replace("eval loss", "eval_loss").split())
    every = "name status method step loss eval_loss tokens started tags note …".split()
    assert headings <= set(every), "a heading is whole, or not there"
    if "step" in headings:
        assert all(row.split()[3] == "400/400" for row in rows), "numbers are whole"
    if width >= 80:
        assert all("0.552" in row for row in rows)
        assert "…" in table or (name, width) == ("short", 110)
    if name == "short":
        assert ("bas" in table) == (width >= 80), "tags are cut, to four signs at least"


def test_a_silent_run_is_marked() -> None:
    runs = [
        ("alive", run(status="running", updated_at=ago(seconds=119))),
        ("dead", run(status="running", updated_at=ago(minutes=14))),
        ("done", run(status="finished", updated_at=ago(days=3))),
    ]
    table = render_runs(runs, as_json=False, now=NOW)
    alive, dead, done = table.splitlines()[1:]
    assert "running " in alive
    assert "running? silent 14m00s" in dead
    assert "finished" in done
    assert table.count("?") == 1


def test_json_holds_plain_values() -> None:
    record = run(
        status="running",
        started_at=ago(minutes=30),
        updated_at=ago(minutes=5),
        metrics={"loss": float("nan"), "eval_loss": 0.5},
    )
    text = render_runs([("r", record)], as_json=True, now=NOW)
    (entry,) = json.loads(text, parse_constant=lambda name: f"found {name}")
    assert entry["status"] == "running?"
    assert entry["silent_seconds"] == 300
    assert entry["age_seconds"] == 1800
    assert entry["loss"] is None
    assert entry["eval_loss"] == 0.5
    assert entry["total_steps"] == 400


def test_nothing_and_the_barest_record() -> None:
    assert render_runs([], as_json=False) == "no runs here yet"
    assert json.loads(render_runs([], as_json=True)) == []
    assert "unknown" in render_runs([("r", {"started_at": "yesterday"})], as_json=False)


def test_a_time_without_zone_is_utc() -> None:
    text = render_runs([("r", run(started_at="2026-05-02T11:59:15"))], as_json=False, now=NOW)
    assert text.endswith("45s ago")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JSON object, and the file is empty"),
        (b"\xff\xfe", "expected a JSON object, found"),
        (b"[1]", "expected a JSON object, found: '[1]'"),
        (b'{"status": 3}', "status: expected text, not 3"),
        (b'{"tags": [1]}', "tags: expected text, not 1"),
        (b'{"restarts": [null]}', "restarts: expected an object, not None"),
        (b'{"format": 99}', "a newer finray wrote this file"),
    ],
)
def test_an_unreadable_run_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    for name, loss in (("a", 0.5), ("b", 0.4), ("c", 0.3)):
        stored_run(tmp_path, name, metrics={"eval_loss": loss})
    (tmp_path / "c" / "run.json").write_bytes(content)
    at = ["--storage", str(tmp_path)]
    for more in ([], ["--sort", "eval_loss"]):
        assert main(["runs", *more, *at]) == 0
        out, err = capsys.readouterr()
        rows = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
        assert rows == {"a": "finished", "b": "finished", "c": "unreadable"}
        (line,) = err.splitlines()
        assert line.startswith(f"{tmp_path}/c/run.json: {message}") and "; " in line
    assert main(["runs", "--json", *at]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["c"]["status"] == "unreadable" and message in entries["c"]["problem"]
    assert entries["a"]["problem"] is None
    assert main(["runs", "compare", "a", "b", *at]) == 0
    assert main(["runs", "compare", "a", "c", *at]) == 2
    assert message in capsys.readouterr().err
    runs = {run.name: run for run in finray.runs(tmp_path)}
    assert [runs[name].status for name in "abc"] == ["finished", "finished", "unreadable"]
    assert "unreadable" in repr(runs["c"])
    with pytest.raises(finray.InputError, match=r"run\.json"):
        _ = runs["c"].record


def test_an_unreadable_note_or_recipe_hides_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        stored_run(tmp_path, name, metrics={"eval_mine": 0.5}, tags=["x"])
    (tmp_path / "a" / "note.json").write_bytes(b"[]")
    (tmp_path / "b" / "recipe.yaml").write_bytes(b"a: [")
    assert main(["runs", "--sort", "eval_mine", "--storage", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["a", "finished"],
        ["b", "finished"],
    ]
    recipe, note = err.splitlines()
    assert recipe.startswith(f"{tmp_path}/b/recipe.yaml: not a YAML file: ")
    assert recipe.endswith("; restore the file")
    assert note.startswith(f"{tmp_path}/a/note.json: ") and "finray runs note" in note
