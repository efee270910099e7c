"""Background saves to a storage that fails, is slow or is full."""

import errno
import json
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finray.training.common.errors import RunError
from finray.training.common.secrets import HIDDEN
from finray.training.common.storage import Folder
from finray.training.common.uploader import Uploader
from finray.training.config.metric import Metric
from finray.training.config.sections import CheckpointSettings
from finray.training.engine.checkpointer import Checkpointer, SaveState
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records import checkpoint
from finray.training.records.run_folder import read_run
from finray.training.run import train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NO_PAUSES = (0.0, 0.0)


class Store:
    """Replaces `Folder.upload`: fails `failures` times, and waits while it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self.attempts = 0
        self.error = OSError(errno.ENOSPC, "No space left on device")
        self.is_open = threading.Event()
        self.is_open.set()
        upload = Folder.upload

        def guarded(folder: Folder, source: Path) -> None:
            self.attempts += 1
            assert self.is_open.wait(60)
            upload(folder, source)
            if self.failures > 0:  # after half of the work, the manifest
                self.failures -= 1
                raise self.error

        monkeypatch.setattr(Folder, "upload", guarded)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def make_checkpointer(
    folder: Path,
    uploads: Uploader,
    *,
    states: list[SaveState] | None = None,
    others: Callable[[], list[str | None]] = list,
) -> Checkpointer:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return Checkpointer(
        Folder(str(folder / "checkpoints")),
        scratch,
        rank=0,
        world_size=1 + len(others()),
        settings=CheckpointSettings(keep=1),
        watched=Metric("eval_loss", "min"),
        uploads=uploads,
        before_publishing=lambda: None,
        gather=lambda value: [value, *others()],
        on_saved=([] if states is None else states).append,
        last_step=None,
    )


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weights" * 1000)


def test_a_store_that_fails_twice_is_tried_again(store: Store, tmp_path: Path) -> None:
    store.failures = 2
    states: list[SaveState] = []
    uploads = Uploader(NO_PAUSES)
    checkpointer = make_checkpointer(tmp_path, uploads, states=states)
    checkpointer.save(5, write, {})
    checkpointer.close()
    assert store.attempts == 3
    assert checkpoint.choose(Folder(str(tmp_path / "checkpoints"))).step == 5
    assert [(state.step, state.error) for state in states] == [(5, None)]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_full_store_costs_no_good_checkpoint(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-a-usual-form-42")
    store.error = OSError("no room for not-a-usual-form-42")
    states: list[SaveState] = []
    checkpointer = make_checkpointer(tmp_path, Uploader(NO_PAUSES), states=states)
    checkpointer.save(5, write, {})
    checkpointer.wait()
    store.failures = 9
    for step in (10, 15):
        checkpointer.save(step, write, {})
        checkpointer.wait()
    assert states[-1].step == 5 and states[-1].error == f"step 15: no room for {HIDDEN}"
    folder = Folder(str(tmp_path / "checkpoints"))
    assert checkpoint.choose(folder).step == 5
    assert folder.files() == ["step-00000005/rank-0.json", "step-00000005/weights"]
    checkpointer.save(20, write, {})
    with pytest.raises(
        RunError, match=r"saving a checkpoint failed 3 times in a row; step 20: .* step 5"
    ):
        checkpointer.wait()


def test_a_failed_save_is_made_good_by_the_next(store: Store, tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path, Uploader(NO_PAUSES))
    store.failures = 3
    checkpointer.save(5, write, {})
    with pytest.raises(
        RunError, match=r"the last checkpoint could not be saved; step 5: .*No space"
    ):
        checkpointer.close()
    checkpointer.save(10, write, {})
    checkpointer.close()
    assert checkpointer.state.step == 10 and checkpointer.state.error is None
    assert Folder(str(tmp_path / "checkpoints")).names() == ["step-00000010"]


def test_training_goes_on_while_a_store_is_slow(store: Store, tmp_path: Path) -> None:
    uploads = Uploader()
    checkpointer = make_checkpointer(tmp_path, uploads)
    store.is_open.clear()
    checkpointer.save(5, write, {})  # returns
    assert not checkpointer.is_idle
    threading.Timer(0.3, store.is_open.set).start()
    checkpointer.save(10, write, {})  # waits: one upload at a time
    assert checkpointer.state.step == 5 and checkpointer.state.waited_seconds > 0
    checkpointer.close()
    assert checkpointer.state.step == 10


def test_a_checkpoint_is_whole_when_all_workers_have_saved(store: Store, tmp_path: Path) -> None:
    replies: list[str | None] = [None]
    checkpointer = make_checkpointer(tmp_path, Uploader(NO_PAUSES), others=lambda: replies)
    checkpointer.save(5, write, {})
    checkpointer.wait()
    replies[0] = "the store is away"
    checkpointer.save(10, write, {})
    checkpointer.wait()
    assert checkpointer.state.step == 5
    assert checkpointer.state.error == "step 10: worker 1: the store is away"


def test_a_full_disk_while_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = make_checkpointer(tmp_path, Uploader(NO_PAUSES))
    checkpointer.save(5, write, {})
    checkpointer.wait()

    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        checkpointer.save(10, fail, {})
    checkpointer = make_checkpointer(tmp_path, Uploader(NO_PAUSES))
    usage = namedtuple("usage", "total used free")
    disk_usage = "finray.training.engine.checkpointer.shutil.disk_usage"
    monkeypatch.setattr(disk_usage, lambda _: usage(10, 10, 0))
    checkpointer.save(10, fail, {})
    checkpointer.wait()
    assert checkpointer.state.error is not None and "is full" in checkpointer.state.error
    assert Folder(str(tmp_path / "checkpoints")).names() == ["step-00000005"]


def test_what_is_no_fault_of_the_store_is_raised(tmp_path: Path) -> None:
    uploads = Uploader(NO_PAUSES)

    def fail() -> None:
        raise KeyError("a bug")

    uploads.start(fail)
    with pytest.raises(KeyError, match="a bug"):
        uploads.wait()


def test_a_run_outlives_a_store_that_fails(
    store: Store, tmp_path: Path, tiny_model: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finray.training.config.recipe import recipe_from_dict

    monkeypatch.setattr("finray.training.common.uploader.PAUSES", NO_PAUSES)
    values: dict[str, Any] = {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 128},
        "optim": {"batch_size": 4, "micro_batch_size": 4, "max_steps": 6},
        "checkpoint": {"every_steps": 2, "keep": 1},
        "log": {"every_steps": 1, "to": []},
        "scale": {"workers": 0},
        "storage": str(tmp_path / "runs"),
    }
    store.failures = 3
    record = train(recipe_from_dict(values), InProcessLauncher())
    assert record["last_saved_step"] == 6 and record["save_error"] is None
    assert store.failures == 0
    folder = Folder(str(tmp_path / "runs/run"))
    assert (folder / "checkpoints").names() == ["step-00000006"]
    values["name"] = "lost"
    store.failures = 99
    with pytest.raises(RunError, match="saving a checkpoint failed 3 times in a row; step 6"):
        train(recipe_from_dict(values), InProcessLauncher())
    record = read_run(Folder(str(tmp_path / "runs/lost")))
    assert record is not None and record["status"] == "failed" and record["step"] == 6
    assert record["last_saved_step"] is None and "step 6" in record["save_error"]
    assert "No space left" in json.dumps(record)
