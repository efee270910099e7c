"""Two Ray Train workers that are killed or stopped, and go on as if nothing had been."""

from pathlib import Path

import pytest
from harness import (
    Finray,
    assert_same_result,
    losses,
    reached,
    record,
    wait_until,
    workers,
)

pytestmark = pytest.mark.timeout(600)
WORKERS = {"scale__workers": 2}


@pytest.fixture(scope="module")
def undisturbed(shared_finray: Finray) -> Path:
    """The run with two workers that every other one must equal."""
    shared_finray.run("train", shared_finray.recipe(**WORKERS))
    run = shared_finray.folder / "runs" / "run"
    assert sorted(losses(run)) == list(range(1, 61))
    assert record(run)["world_sizes"] == [2]
    return run


def test_sigkill_of_a_worker_in_a_save(finray: Finray, undisturbed: Path) -> None:
    """Restarted by max_failures; the driver never ends."""
    run = finray.folder / "runs" / "run"
    command = finray.start("train", finray.recipe(**WORKERS))
    wait_until(lambda: reached(run, 12), "step 12")

    def saving() -> bool:
        newest = max((run / "checkpoints").glob("step-*"))
        return not (newest / "rank-0.json").exists() or not (newest / "rank-1.json").exists()

    wait_until(saving, "a save")
    next(workers(command)).kill()
    assert command.wait() == 0, command.output()
    assert_same_result(run, undisturbed)
    assert record(run)["world_sizes"] == [2, 2]
    assert record(run)["restarts"][0]["step"] >= 5


def test_sigkill_of_the_driver(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe(**WORKERS)
    run = finray.folder / "runs" / "run"
    command = finray.start("train", recipe)
    wait_until(lambda: reached(run, 17), "step 17")
    command.watch_family()
    command.kill()
    # Ray's own agents notice later; what could still write into the run must be gone.
    training = [process for process in command.survivors(30) if "Train" in process.name()]
    assert not training, "workers outlive their driver"
    finray.run("train", recipe)
    assert_same_result(run, undisturbed)


def test_ctrl_c_saves_and_leaves_nothing_behind(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe(**WORKERS, checkpoint__every_steps=50)
    run = finray.folder / "runs" / "run"
    command = finray.start("train", recipe)
    wait_until(lambda: reached(run, 7), "step 7")
    command.watch_family()
    command.interrupt()
    assert command.wait() == 130, command.output()
    assert "Traceback" not in command.output()
    assert not command.survivors(30), "processes outlive Ctrl-C"
    assert record(run)["status"] == "stopped"
    assert list(run.glob("checkpoints/step-*/rank-1.json"))
    finray.run("train", recipe)
    assert_same_result(run, undisturbed)
