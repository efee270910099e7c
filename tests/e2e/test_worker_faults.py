"""Two workers that are killed or stopped, and go on as if nothing had been.

As processes of this machine, and as Ray Train's; both must come to the same weights.
"""

from pathlib import Path
from typing import Any

import pytest
from support.harness import (
    Command,
    Finray,
    assert_same_result,
    losses,
    reached,
    record,
    wait_until,
    workers,
)
from support.spoiled import spoil_loss

WORKERS = {"scale__workers": 2}
OUT_OF_MEMORY = (
    "if rank == 1 and len(batch.rows) > 2: "
    'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")'
)
BAD_ROW = 'if rank == 1 and sum(calls) == 5: raise ValueError("this row is bad\\nand more")'
SLOW = "time.sleep(0.05)"


@pytest.fixture(scope="module")
def undisturbed(shared_finray: Finray) -> Path:
    """The run with two processes that every other one must equal."""
    shared_finray.run("train", shared_finray.recipe(**WORKERS))
    run = shared_finray.folder / "runs" / "run"
    assert sorted(losses(run)) == list(range(1, 31))
    assert record(run)["world_sizes"] == [2]
    return run


ON_RAY = ("train", "--address", "local")


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(("train",), id="processes"),
        pytest.param(ON_RAY, id="ray", marks=pytest.mark.ray),
    ],
)
def test_sigkill_of_a_worker_in_a_save(
    finray: Finray, undisturbed: Path, train: tuple[str, ...]
) -> None:
    """Restarted by max_failures; the driver never ends."""
    run = finray.folder / "runs" / "run"
    command = finray.start(*train, finray.recipe(**WORKERS))
    wait_until(lambda: reached(run, 12), "step 12")

    def saving() -> bool:
        newest = max((run / "checkpoints").glob("step-*"))
        return not (newest / "rank-0.json").exists() or not (newest / "rank-1.json").exists()

    wait_until(saving, "a save", brief=True)
    next(workers(command)).kill()
    assert command.wait() == 0, command.output()
    assert_same_result(run, undisturbed)
    assert record(run)["world_sizes"] == [2, 2]
    assert record(run)["restarts"][0]["step"] >= 5


def test_sigkill_of_the_driver(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe(**WORKERS)
    run = finray.folder / "runs" / "run"
    finray.keep_rehearsal(recipe)
    command = finray.start("train", recipe, fresh=True)
    wait_until(lambda: reached(run, 17), "step 17")
    kill_driver(command)
    finray.run("train", recipe)
    assert_same_result(run, undisturbed)


def kill_driver(command: Command) -> None:
    training = set(workers(command))
    assert len(training) == 2
    command.kill()
    # Ray's own agents notice later; what could still write into the run must be gone.
    assert not command.survivors(120, training), "workers outlive their driver"


def test_ctrl_c_saves_and_leaves_nothing_behind(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe(**WORKERS, checkpoint__every_steps=50)
    run = finray.folder / "runs" / "run"
    command = finray.start("train", recipe)
    wait_until(lambda: reached(run, 1), "step 1", brief=True)  # all 30 take a second
    interrupt(command, run)
    finray.run("train", recipe)
    assert_same_result(run, undisturbed)


def interrupt(command: Command, run: Path) -> None:
    command.watch_family()
    command.interrupt()
    assert command.wait() == 130, command.output()
    assert "Traceback" not in command.output()
    assert not command.survivors(120), "processes outlive Ctrl-C"
    assert record(run)["status"] == "stopped"
    assert list(run.glob("checkpoints/step-*/rank-1.json"))


HANGS: dict[str, Any] = {"scale__hang_timeout": 10, "checkpoint__every_steps": 20}
"""Saves are rare: a worker that is stopped in one leaves the others in a barrier of Ray Train's."""


def test_a_worker_that_hangs(finray: Finray, undisturbed: Path) -> None:
    """The other one says where it waits, and both are started again."""
    run = finray.folder / "runs" / "run"
    command = finray.start("train", finray.recipe(**WORKERS, **HANGS))
    wait_until(lambda: reached(run, 21), "step 21")
    hang_to_the_end(command, run)
    assert_same_result(run, undisturbed)
    assert record(run)["world_sizes"] == [2, 2]


def hang_to_the_end(command: Command, run: Path) -> None:
    next(workers(command)).suspend()
    assert command.wait() == 0, command.output()
    files = sorted(run.glob("stacks/rank-*.txt"))
    assert "_run_epoch" in "".join(file.read_text(encoding="utf-8") for file in files)
    reason = record(run)["restarts"][-1]["reason"]
    assert all(f"stacks/{file.name}" in reason for file in files)
    assert " is stopped, by SIGSTOP or a debugger: step 2" in reason
    assert not command.survivors(120), "the stopped process is still there"


@pytest.mark.slow
def test_one_worker_is_out_of_memory(finray: Finray, undisturbed: Path) -> None:
    """While the other waits for its gradients. It is no failure, and half the microbatch does."""
    run = finray.folder / "runs" / "run"
    environment = spoil_loss(finray.folder, OUT_OF_MEMORY)
    path = finray.recipe(**WORKERS, scale__max_failures=0, optim__micro_batch_size=4)
    command = finray.start("train", path, environment=environment)
    assert command.wait() == 0, command.output()
    assert_same_result(run, undisturbed)  # whose recipe says 2
    assert_halved(run)
    assert record(run)["world_sizes"] == [2, 2]


def assert_halved(run: Path) -> None:
    assert record(run)["micro_batch_size"] == 2
    assert "CUDA out of memory" in record(run)["restarts"][0]["reason"]


@pytest.mark.ray
@pytest.mark.slow
def test_one_run_on_ray_through_all_of_it(finray: Finray, undisturbed: Path) -> None:
    """Out of memory, Ctrl-C, SIGKILL of the driver, and a worker that hangs."""
    run = finray.folder / "runs" / "run"
    environment = spoil_loss(finray.folder, f"{SLOW}\n{OUT_OF_MEMORY}")
    recipe = finray.recipe(**WORKERS, **HANGS, optim__micro_batch_size=4)

    def start(*changes: str) -> Command:
        return finray.start(*ON_RAY, recipe, *changes, environment=environment)

    command = start("--set", "scale.max_failures=0")
    wait_until(lambda: reached(run, 1), "step 1")
    assert_halved(run)
    assert record(run)["world_sizes"] == [2, 2]
    interrupt(command, run)

    command = start()
    wait_until(lambda: len(record(run)["world_sizes"]) == 3 and reached(run, 12), "step 12")
    kill_driver(command)

    command = start()
    wait_until(lambda: len(record(run)["world_sizes"]) == 4 and reached(run, 21), "step 21")
    hang_to_the_end(command, run)
    assert_same_result(run, undisturbed)
    assert_halved(run)
    assert record(run)["world_sizes"] == [2] * 5


@pytest.mark.slow
def test_an_error_that_a_restart_leads_to_again(finray: Finray) -> None:
    """It is not tried a third time, though max_failures allows that."""
    run = finray.folder / "runs" / "run"
    environment = spoil_loss(finray.folder, BAD_ROW)
    path = finray.recipe(**WORKERS, optim__max_steps=4)
    command = finray.start("train", path, environment=environment)
    assert command.wait() == 1, command.output()
    assert record(run)["world_sizes"] == [2, 2]
    error = "worker 1 failed: ValueError: this row is bad"
    assert record(run)["restarts"][0]["reason"].startswith(error)
    assert record(run)["error"].startswith(error)
    assert record(run)["error"].endswith("; it happened again after a restart")


def test_ctrl_c_before_the_first_step(finray: Finray) -> None:
    """Nothing is reached yet: it leaves at once, and so do the workers."""
    command = finray.start("train", finray.recipe(**WORKERS), fresh=True)
    wait_until(lambda: len(list(workers(command))) == 2, "two workers")
    command.interrupt()
    assert command.wait() == 130, command.output()
    assert "Traceback" not in command.output()
    assert not command.survivors(120), "processes outlive Ctrl-C"


@pytest.mark.ray
@pytest.mark.slow
def test_much_data_is_prepared_by_ray_and_trained_on_without(finray: Finray) -> None:
    """Ray is started for what it is good at, and once: the data is prepared then."""
    rows = finray.data.read_text(encoding="utf-8")
    finray.data = finray.folder / "much.jsonl"
    finray.data.write_text(rows * (9_000_000 // len(rows)), encoding="utf-8")
    for name, starts_ray in (("first", True), ("second", False)):
        recipe = finray.recipe(**WORKERS, name=name, optim__max_steps=2)
        command = finray.start("train", recipe)
        assert command.wait() == 0, command.output()
        assert ("starting Ray" in command.output()) == starts_ray
        assert record(finray.folder / "runs" / name)["nodes"] == []
    (prepared,) = (finray.folder / "runs" / "prepared").glob("[0-9a-f]*")
    assert record(finray.folder / "runs" / "first")["prepared"] == prepared.name
