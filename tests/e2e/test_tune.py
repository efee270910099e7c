"""Real sweeps of tiny trials: pruning, kills, interrupts, failures, and what they leave."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.harness import Finray, losses, metrics, reached, record, wait_until, workers

pytestmark = pytest.mark.ray

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
SPACE = {
    "optim.learning_rate": {"log_uniform": [1e-5, 5e-2]},
    "adapter.rank": {"choice": [2, 4, 8]},
    "adapter.alpha": {"times": 2, "of": "adapter.rank"},
}


def write_sweep(finray: Finray, recipe: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A sweep of short trials on the tiny model."""
    base = finray.recipe(
        **{
            "adapter__dropout": 0.0,
            "optim__max_steps": 18,
            "data__holdout": 0.1,
            "checkpoint__every_steps": 2,
            **(recipe or {}),
        }
    )
    values = {"name": "sweep", "recipe": str(base), "search": SPACE, "trials": 6, **settings}
    path = finray.folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def sweep_record(finray: Finray) -> dict[str, Any]:
    """sweep.json."""
    path = finray.folder / "runs" / "sweep" / "sweep.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values


def states(finray: Finray) -> list[str]:
    return [row["state"] for row in sweep_record(finray).get("trials", [])]


def slots(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of trials; in a task they have the name of Ray Tune's wrapper."""
    names = ("ResourceTrainable", "TrialSlot")
    return [one for one in processes if any(name in one.name() for name in names)]


def test_a_sweep_killed_in_its_middle_goes_on(finray: Finray) -> None:
    sweep = write_sweep(finray, trials=7, concurrency=2, retrain={"seeds": [3], "data": "train"})
    folder = finray.folder / "runs" / "sweep"
    command = finray.start("tune", sweep)
    wait_until(lambda: states(finray).count("running") == 2 and len(states(finray)) > 2, "trials")
    wait_until(lambda: bool(slots(command.watch_family())), "slots")
    held = set(slots(command.watch_family()))
    command.kill()
    ended = [row for row in sweep_record(finray)["trials"] if row["state"] != "running"]
    running = [row["number"] for row in sweep_record(finray)["trials"] if row["state"] == "running"]
    assert ended and running
    assert not command.survivors(120, held), "slots outlive their driver"
    started = {row["number"]: run_of(folder, row["number"])["started_at"] for row in ended}

    finray.run("tune", sweep)
    after = sweep_record(finray)
    rows = {row["number"]: row for row in after["trials"]}
    assert after["status"] == "finished" and len(rows) == 7
    for row in ended:
        assert rows[row["number"]] == row, "a trial that had ended ran again"
        again = run_of(folder, row["number"])
        assert again["started_at"] == started[row["number"]] and len(again["world_sizes"]) == 1
    assert all(rows[number]["state"] in ("finished", "pruned") for number in running)
    assert {row["state"] for row in rows.values()} == {"finished", "pruned"}
    # one preparation for all trials, the base and the retrained run
    assert len(list((finray.folder / "runs" / "prepared").glob("*/manifest.json"))) == 1

    best = rows[after["best"][0]]
    finished = [row for row in rows.values() if row["state"] == "finished"]
    assert best["values"][0] == min(row["values"][0] for row in finished)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    kept = [path.parent.parent.name for path in folder.glob("trials/*/adapter/adapter_config.json")]
    assert kept == [f"trial-{best['number']:04d}"]
    assert not list(folder.glob("trials/*/checkpoints"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "of each trial" in page and f"trial {best['number']}" in page

    # the best settings, run alone, give the best trial's value
    finray.run("train", folder / "best.yaml", "--local")
    alone = record(finray.folder / "runs" / "sweep-best")["metrics"]["eval_loss"]
    assert alone == pytest.approx(best["values"][0], rel=1e-4)
    assert after["retrained"]["runs"][0]["seed"] == 3
    assert "eval_loss" in after["retrained"]["spread"]

    # nothing is left to do, and nothing is done
    assert "finished" in finray.run("tune", sweep)
    shown = finray.run("tune", "show", folder)
    assert f"*{best['number']}" in shown and "pruned" in shown
    message = finray.run("tune", sweep, "--set", "search=default", code=2)
    assert "another name" in message


def run_of(sweep: Path, number: int) -> dict[str, Any]:
    return record(sweep / "trials" / f"trial-{number:04d}")


@pytest.mark.slow
def test_a_lost_slot_and_ctrl_c_cost_little(finray: Finray) -> None:
    sweep = write_sweep(finray, {"optim__max_steps": 150}, trials=2, concurrency=1)
    command = finray.start("tune", sweep)
    trial = finray.folder / "runs" / "sweep" / "trials" / "trial-0000"
    wait_until(lambda: bool(list(trial.glob("checkpoints/*/rank-0.json"))), "a checkpoint")
    (slot,) = slots(command.watch_family())
    slot.kill()
    wait_until(lambda: len(record(trial).get("world_sizes", [])) == 2, "the trial elsewhere")
    lost = record(trial)["restarts"][0]["step"]
    assert lost > 0, "the trial started from scratch"
    assert "trial 0: its process was lost" in command.output()

    wait_until(lambda: reached(trial, lost + 5), "some more steps")
    command.watch_family()
    command.interrupt()
    assert command.wait() == 130, command.output()
    assert "Traceback" not in command.output()
    assert not command.survivors(120), "processes outlive Ctrl-C"
    assert sweep_record(finray)["status"] == "stopped" and states(finray) == ["running"]
    saved = record(trial)["step"]
    finray.run("tune", sweep)
    assert sweep_record(finray)["status"] == "finished" and len(states(finray)) == 2
    assert [one["step"] for one in record(trial)["restarts"]] == [lost, saved]
    assert sorted(losses(trial)) == list(range(1, 151))


@pytest.mark.slow
def test_a_killed_sweep_of_several_workers_goes_on(finray: Finray) -> None:
    sweep = write_sweep(finray, {"scale__workers": 2, "optim__max_steps": 60}, trials=2)
    trial = finray.folder / "runs" / "sweep" / "trials" / "trial-0000"
    command = finray.start("tune", sweep)
    wait_until(lambda: bool(list(trial.glob("checkpoints/*/rank-1.json"))), "a checkpoint")
    training = set(workers(command))
    assert training
    command.kill()
    assert not command.survivors(120, training)
    finray.run("tune", sweep)
    assert set(states(finray)) <= {"finished", "pruned"} and "finished" in states(finray)
    assert record(trial)["world_sizes"] == [2, 2] and record(trial)["restarts"][0]["step"] > 0
    rows = sweep_record(finray)["trials"]
    assert rows[0]["curve"] and rows[0]["curve"][0][0] > 0
    message = finray.run("tune", sweep, "--set", "concurrency=9", code=2)
    assert "holds 1 at a time" in message and "Traceback" not in message


@pytest.mark.slow
def test_a_population(finray: Finray) -> None:
    """Members that go on from better ones, their checkpoints and curves included."""
    rate = {"optim.learning_rate": {"log_uniform": [1e-5, 5e-2]}}
    sweep = write_sweep(
        finray,
        {"optim__max_steps": 20},
        search=rate,
        trials=4,
        concurrency=2,
        pruning={"kind": "pbt"},
    )
    finray.run("tune", sweep, "--local")
    folder = finray.folder / "runs" / "sweep"
    rows = {row["number"]: row for row in sweep_record(finray)["trials"]}
    assert [row["state"] for row in rows.values()].count("finished") == 4
    children = [row for row in rows.values() if row["parent"]]
    assert children
    for row in children:
        run = folder / "trials" / f"trial-{row['number']:04d}"
        parent = folder / "trials" / f"trial-{row['parent']['trial']:04d}"
        begins = record(run)["restarts"][0]["step"]
        assert begins > 0 and begins % 4 == 0
        own, theirs = losses(run), losses(parent)
        assert {step: own[step] for step in own if step <= begins} == {
            step: theirs[step] for step in theirs if step <= begins
        }
        rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "loss" in line}
        others = {line["step"]: line["learning_rate"] for line in metrics(parent) if "loss" in line}
        settings = [
            one["settings"]["optim.learning_rate"] for one in (row, rows[row["parent"]["trial"]])
        ]
        after = begins + 1
        if after in rates and after in others and settings[0] != settings[1]:
            assert rates[after] / others[after] == pytest.approx(settings[0] / settings[1])
    best = (folder / "best.yaml").read_text(encoding="utf-8")
    assert ("changed during training" in best) == bool(
        rows[sweep_record(finray)["best"][0]]["parent"]
    )


def test_trials_that_all_fail_alike_end_the_sweep(finray: Finray) -> None:
    sweep = write_sweep(
        finray,
        {"adapter__targets": ["q_prj"]},
        trials=50,
        search={"optim.learning_rate": {"log_uniform": [1e-5, 1e-3]}},
    )
    message = finray.run("tune", sweep, code=2)
    assert "q_prj" in message and "same error" in message and "Traceback" not in message
    assert 3 <= states(finray).count("failed") <= 5


@pytest.mark.slow
def test_a_pareto_front(finray: Finray) -> None:
    sweep = write_sweep(
        finray,
        {"optim__max_steps": 4},
        trials=4,
        concurrency=1,
        objective=["eval_loss", "adapter_bytes"],
        sampler="nsga2",
    )
    finray.run("tune", sweep)
    after = sweep_record(finray)
    assert states(finray) == ["finished"] * 4
    rows = {row["number"]: row["values"] for row in after["trials"]}
    for number in after["best"]:
        loss, size = rows[number]
        assert not any(other[0] < loss and other[1] < size for other in rows.values())
    files = sorted(path.name for path in (finray.folder / "runs/sweep/pareto").iterdir())
    assert files == sorted(f"trial-{number:04d}.yaml" for number in after["best"])


@pytest.mark.slow
def test_a_sweep_of_an_online_method_searches_the_highest_reward(finray: Finray) -> None:
    reward = (
        "def short(completion_ids, **columns):\n    return [-len(ids) for ids in completion_ids]"
    )
    (finray.folder / "rewards.py").write_text(reward, encoding="utf-8")
    method = {
        "kind": "grpo",
        "rewards": [{"file": "rewards.py:short"}],
        "generations": 2,
        "max_completion": 8,
    }
    sweep = write_sweep(
        finray,
        {"method": method, "optim__max_steps": 4, "data__packing": "auto"},
        search={"optim.learning_rate": {"choice": [1e-5, 1e-2, 5e-2]}},
        trials=9,
        concurrency=1,
        retrain={"seeds": [1]},
    )
    finray.run("tune", sweep)
    after = sweep_record(finray)
    assert after["objectives"] == [{"metric": "eval_reward", "mode": "max"}]
    assert after["over"] == "all 3 valid settings have been tried"
    values = {row["number"]: row["values"][0] for row in after["trials"] if row["values"]}
    assert len(after["trials"]) == 3 and values[after["best"][0]] == max(values.values())
    assert after["retrained"]["spread"]["reward"]["mean"] < 0


@pytest.mark.slow
def test_the_quickstart_sweep(finray: Finray) -> None:
    """The shipped sweep, at a reduced size."""
    finray.run(
        *("tune", QUICKSTART / "tune.yaml", "--set", "trials=2", "--set", "concurrency=1"),
        *("--set", "recipe.optim.epochs=null", "--set", "recipe.optim.max_steps=2"),
        *("--set", "recipe.optim.batch_size=2", "--set", "recipe.optim.micro_batch_size=2"),
        *("--set", "recipe.data.eval.0.weight=0.05", "--set", f"storage={finray.folder}/runs"),
    )
    path = finray.folder / "runs" / "quickstart-sweep" / "sweep.json"
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["status"] == "finished" and len(after["trials"]) == 2
