"""Runs in one process that are killed, stopped or damaged, and go on as if nothing had been."""

import os
from pathlib import Path

import pytest
from support.harness import Finray, assert_same_result, losses, reached, record, wait_until
from support.streamed import method_rows, write_lines


@pytest.fixture(scope="module")
def undisturbed(shared_finray: Finray) -> Path:
    """The run that every other one must equal."""
    shared_finray.run("train", shared_finray.recipe())
    run = shared_finray.folder / "runs" / "run"
    assert sorted(losses(run)) == list(range(1, 31))
    first, last = losses(run)[1], losses(run)[30]
    assert last < first - 0.2, "the loss does not fall: nothing is learnt"
    return run


def kill_after(finray: Finray, recipe: Path, step: int) -> None:
    command = finray.start("train", recipe)
    wait_until(lambda: reached(finray.folder / "runs" / "run", step), f"step {step}")
    command.kill()
    assert record(finray.folder / "runs" / "run")["status"] == "running"


def test_sigkill_in_the_middle_of_a_save(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe()
    run = finray.folder / "runs" / "run"
    for _ in range(10):
        command = finray.start("train", recipe)
        earlier = {path.name for path in (run / "checkpoints").glob("step-*")}
        unfinished: list[Path] = []

        def being_written(earlier: set[str] = earlier, partial: list[Path] = unfinished) -> bool:
            new = [p for p in (run / "checkpoints").glob("step-*") if p.name not in earlier]
            partial[:] = [path for path in new if not (path / "rank-0.json").exists()]
            return bool(partial)

        wait_until(being_written, "an unfinished checkpoint", brief=True)
        command.kill()
        if not (unfinished[0] / "rank-0.json").exists():
            break
    else:
        pytest.fail("no save was met in its middle")
    finray.run("train", recipe)
    assert_same_result(run, undisturbed)
    reasons = " ".join(restart["reason"] for restart in record(run)["restarts"])
    assert f"{unfinished[0].name}: unfinished" in reasons


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_damaged_newest_checkpoint_is_named(finray: Finray, undisturbed: Path, name: str) -> None:
    recipe = finray.recipe()
    kill_after(finray, recipe, 21)
    run = finray.folder / "runs" / "run"
    finished = [p.parent for p in sorted((run / "checkpoints").glob("step-*/rank-0.json"))]
    newest, before = finished[-1], finished[-2]
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    output = finray.run("train", recipe)
    assert f"{newest.name}: damaged, {name}" in output
    assert f"resumed from {before.name}" in output
    assert_same_result(run, undisturbed)
    assert record(run)["status"] == "finished"
    assert "finished" in finray.run("train", recipe)


def test_all_checkpoints_damaged_stops(finray: Finray) -> None:
    recipe = finray.recipe()
    kill_after(finray, recipe, 12)
    run = finray.folder / "runs" / "run"
    for weights in run.glob("checkpoints/step-*/adapter_model.safetensors"):
        weights.write_bytes(b"")
    output = finray.run("train", recipe, code=1)
    assert "are damaged" in output and "adapter_model.safetensors" in output
    assert "Traceback" not in output
    assert record(run)["status"] == "failed"


def test_ctrl_c_saves_and_leaves(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe(checkpoint__every_steps=50)
    run = finray.folder / "runs" / "run"
    finray.keep_rehearsal(recipe)
    command = finray.start("train", recipe, fresh=True)
    wait_until(lambda: reached(run, 7), "step 7")
    command.interrupt()
    assert command.wait() == 130, command.output()
    assert "Traceback" not in command.output()
    assert record(run)["status"] == "stopped"
    assert list(run.glob("checkpoints/step-*/rank-0.json"))
    output = finray.run("train", recipe)
    assert "resumed from" in output
    assert_same_result(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto", "pretrain"])
def test_streamed_rows_after_sigkill(finray: Finray, kind: str) -> None:
    """A window an epoch; the files are touched before each start."""
    data = write_lines(finray.folder / "rows.jsonl", method_rows(kind, 40))
    changes = {"method": {"kind": kind}, "data__train": [str(data)], "data__holdout": 0.2}
    streamed = {**changes, "data__prepare": "streaming", "optim__batch_size": 4}
    whole, parts = (finray.recipe(name=name, **streamed) for name in ("whole", "run"))
    run = finray.folder / "runs" / "run"
    finray.run("train", whole)
    for step in (7, 18):
        os.utime(data, (step, step))
        kill_after(finray, parts, step)
        kept = [path.name for path in (run / "windows").iterdir() if path.name.isdecimal()]
        assert kept and "000000" not in kept
    finray.run("train", parts)
    assert_same_result(run, finray.folder / "runs" / "whole")
    counts = [finray.folder / "runs" / name / "windows/counts.json" for name in ("whole", "run")]
    assert counts[0].read_bytes() == counts[1].read_bytes()


def test_one_driver_at_a_time(finray: Finray, undisturbed: Path) -> None:
    recipe = finray.recipe()
    run = finray.folder / "runs" / "run"
    first = finray.start("train", recipe)
    wait_until(lambda: reached(run, 5), "step 5")
    assert "another finray process is using it" in finray.run("train", recipe, code=2)
    assert first.wait() == 0, first.output()
    assert_same_result(run, undisturbed)
    assert not (run / "lock.json").exists()


def test_another_run_is_refused_in_its_place(finray: Finray) -> None:
    data = finray.folder / "own.jsonl"
    data.write_bytes(finray.data.read_bytes())
    own = {"data__train": [{"path": str(data)}]}
    kill_after(finray, finray.recipe(**own), 6)
    output = finray.run("train", finray.recipe(**own, optim__learning_rate=2e-2), code=2)
    assert "optim.learning_rate: 0.01 before, 0.02 now" in output
    output = finray.run("train", finray.recipe(**own, adapter__rank=8), code=2)
    assert "adapter.rank: 4 before, 8 now" in output
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[1:]), encoding="utf-8")
    assert "changed since" in finray.run("train", finray.recipe(**own), code=2)
