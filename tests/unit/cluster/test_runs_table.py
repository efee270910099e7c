"""finray runs: one line per run, silent runs marked, and the same as JSON."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

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
    assert render_runs([(name, long)], as_json=False, now=NOW, width=100) == whole, "it cannot fit"


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
