"""A 4-bit base under an adapter, by the real command: learnt, killed, shared, gone on from."""

import json
import shutil
from pathlib import Path

import pytest
from support.harness import Finray, assert_same_result, losses, metrics, reached, record, wait_until

QLORA = {
    "model__quantize": "nf4",
    "adapter__dropout": 0.0,
    "data__holdout": 0.1,
    "eval__every_steps": 10,
    "eval__samples": 4,
}


@pytest.fixture(scope="module")
def undisturbed(shared_finray: Finray) -> Path:
    """The run in one process that the others must equal."""
    shared_finray.run("train", shared_finray.recipe(**QLORA), "--local")
    return shared_finray.folder / "runs" / "run"


def test_it_learns(undisturbed: Path, shared_finray: Finray) -> None:
    logged = losses(undisturbed)
    assert logged[30] < logged[1] - 0.2
    evaluated = {
        line["step"]: line["eval_loss"] for line in metrics(undisturbed) if "eval_loss" in line
    }
    assert sorted(evaluated) == [0, 10, 20, 30]
    assert evaluated[30] < evaluated[10] < evaluated[0]
    outlook = json.loads(shared_finray.run("check", shared_finray.recipe(**QLORA), "--json"))
    parameters = record(undisturbed)["parameters"]
    assert {name: parameters[name] for name in ("total", "trainable")} == outlook["parameters"]
    assert (parameters["adapter"], parameters["quantize"]) == ("lora", "nf4")


def test_sigkill_and_again(finray: Finray, undisturbed: Path) -> None:
    recipe, run = finray.recipe(**QLORA), finray.folder / "runs" / "run"
    command = finray.start("train", recipe, "--local")
    wait_until(lambda: reached(run, 17), "step 17")
    command.kill()
    assert "resumed from" in finray.run("train", recipe, "--local")
    assert_same_result(run, undisturbed)


def test_two_workers_take_the_same_steps(finray: Finray, undisturbed: Path) -> None:
    finray.run("train", finray.recipe(**QLORA, scale__workers=2))
    run = finray.folder / "runs" / "run"
    assert record(run)["world_sizes"] == [2]
    assert losses(run) == pytest.approx(losses(undisturbed), abs=2e-3)


def test_a_run_starts_from_the_one_before(shared_finray: Finray, undisturbed: Path) -> None:
    finray = shared_finray
    more = {"name": "more", "adapter": None, "model__adapter": "runs/run"}
    changes = {key: value for key, value in QLORA.items() if "adapter" not in key}
    finray.run("train", finray.recipe(**changes, **more))
    run = finray.folder / "runs" / "more"
    # It starts where the other ended.
    ended = record(undisturbed)["metrics"]["eval_loss"]
    assert record(run)["before"]["eval_loss"] == pytest.approx(ended, abs=1e-5)
    assert sorted(losses(run)) == list(range(1, 31))
    other = finray.folder / "other"
    shutil.copytree(finray.model, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x40")
    changes = {**changes, **more, "name": "other", "model__base": str(other)}
    output = finray.run("train", finray.recipe(**changes), code=2)
    assert f"is an adapter of {finray.model}, and model.base is {other}" in output
    assert not (finray.folder / "runs" / "other").exists()
