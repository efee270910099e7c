"""Preferences by the real command: two workers as one process, a kill that changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forking import ForkServer
from support.harness import Finray, assert_same_result, losses, reached, record, wait_until, workers

STEPS = 12
ON_RAY = ("train", "--address", "local")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "conversations": [{"from": "human", "value": f"What comes after {number}?"}],
            "chosen": {"from": "gpt", "value": f"After {number} comes {number + 1}."},
            "rejected": {"from": "gpt", "value": f"I do not know {number}."},
        }
        for number in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    pairs: Path,
    fork_server: ForkServer,
) -> Iterator[Finray]:
    runner = Finray(tmp_path_factory.mktemp("dpo"), tiny_model, pairs, fork_server)
    yield runner
    runner.end_all()


def make_recipe(command: Finray, name: str, workers: int) -> Path:
    return command.recipe(
        name=name,
        method={
            "kind": "dpo",
            "losses": {"sigmoid": 1.0, "sft": 0.1},
            "precompute_reference": True,
        },
        adapter__dropout=0.0,
        data__holdout=0.1,
        optim__max_steps=STEPS,
        scale__workers=workers,
    )


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(("train",), id="processes"),
        pytest.param(ON_RAY, id="ray", marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_two_workers_and_a_kill(command: Finray, train: tuple[str, ...]) -> None:
    """Either kind of workers ends as two processes do that nothing happens to."""
    runs, way = command.folder / "runs", "-".join(train[1:])
    command.run("train", make_recipe(command, "local", 0))
    undisturbed, killed = runs / "undisturbed", runs / f"killed{way}"
    command.run("train", make_recipe(command, undisturbed.name, 2))
    local, shared = losses(runs / "local"), losses(undisturbed)
    assert sorted(local) == sorted(shared) == list(range(1, STEPS + 1))
    assert shared == pytest.approx(local, abs=1e-5)
    assert local[STEPS] < local[1] - 0.1
    assert len(list(runs.glob("prepared/*/reference-*.parquet"))) == 1
    recipe = make_recipe(command, killed.name, 2)
    started = command.start(*train, recipe)
    wait_until(lambda: reached(killed, 7), "step 7")
    training = set(workers(started))
    started.kill()
    assert training and not started.survivors(120, training)
    command.run(*train, recipe)
    assert_same_result(killed, undisturbed)
    assert record(killed)["restarts"][0]["step"] >= 5


@pytest.mark.parametrize(
    "kind",
    [
        "reward",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("orpo", "kto", "cpo", "simpo")),
    ],
)
def test_the_others_on_two_workers(command: Finray, kind: str) -> None:
    """Step by step as in one process, and held-out pairs are learnt too."""
    runs, curves = command.folder / "runs", []
    for count in (0, 2):
        name = f"{kind}-{count}"
        recipe = command.recipe(
            name=name,
            method={"kind": kind},
            adapter__dropout=0.0,
            data__holdout=0.1,
            optim__max_steps=STEPS,
            scale__workers=count,
        )
        command.run("train", recipe)
        curves.append(losses(runs / name))
        run = record(runs / name)
        assert run["world_sizes"] == [max(1, count)]
        assert run["metrics"]["eval_loss"] < run["before"]["eval_loss"]
    assert sorted(curves[0]) == sorted(curves[1]) == list(range(1, STEPS + 1))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_data_of_another_method_is_refused(command: Finray) -> None:
    output = command.run("check", command.recipe(name="wrong"), code=2)
    assert "pairs.jsonl:1: method sft learns from" in output
    assert (
        "this row is one of the pairs of a chosen and a rejected answer; use method dpo" in output
    )
    assert "Traceback" not in output
