"""Checkpoints: the newest good one is chosen, damaged ones are named, and the best one is kept."""

import json
import math
from pathlib import Path

import pytest

from finray.training.common.errors import RunError
from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.records import checkpoint

WATCHED = Metric("eval_loss", "min")


def save(
    root: Folder, scratch: Path, step: int, *, world_size: int = 1, loss: float | None = None
) -> None:
    for rank in range(world_size):
        staged = scratch / f"{step}-{rank}"
        staged.mkdir()
        if rank == 0:
            (staged / "weights.safetensors").write_bytes(bytes([step % 256]) * 100)
        (staged / f"rng_state_{rank}.pth").write_bytes(b"rng")
        metrics = {} if loss is None else {"eval_loss": loss}
        manifest = checkpoint.make_manifest(staged, rank, world_size, metrics)
        checkpoint.publish(staged, root / checkpoint.checkpoint_name(step), rank, manifest)


@pytest.fixture
def root(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "checkpoints"))


def test_none_yet(root: Folder) -> None:
    assert checkpoint.choose(root) == checkpoint.Choice(None, 0, ())
    assert checkpoint.rotate(root, 1, WATCHED) == []


def test_the_newest_good_checkpoint_is_chosen(root: Folder, tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(root, tmp_path, step, world_size=2)
    assert checkpoint.choose(root) == checkpoint.Choice("step-00000100", 100, ())


@pytest.mark.parametrize("name", ["weights.safetensors", "rng_state_1.pth", "rank-0.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied"])
def test_a_damaged_checkpoint_is_named_and_skipped(
    root: Folder, tmp_path: Path, name: str, how: str
) -> None:
    for step in (5, 10):
        save(root, tmp_path, step, world_size=2)
    content = bytearray(root.read(f"step-00000010/{name}"))
    if how == "flipped":
        content[0] ^= 1
    root.write(f"step-00000010/{name}", bytes(content[:-1] if how == "truncated" else content))
    if how == "emptied":
        root.write(f"step-00000010/{name}", b"")
    choice = checkpoint.choose(root)
    assert choice.step == 5
    assert len(choice.skipped) == 1
    assert "step-00000010: damaged" in choice.skipped[0] and name in choice.skipped[0]


def test_a_missing_file_is_damage(root: Folder, tmp_path: Path) -> None:
    save(root, tmp_path, 5)
    save(root, tmp_path, 10)
    root.delete("step-00000010/weights.safetensors")
    assert "weights.safetensors is missing" in checkpoint.choose(root).skipped[0]


def test_an_interrupted_save_is_unfinished(root: Folder, tmp_path: Path) -> None:
    save(root, tmp_path, 5, world_size=2)
    save(root, tmp_path, 10, world_size=2)
    root.delete("step-00000010/rank-1.json")
    choice = checkpoint.choose(root)
    assert choice.step == 5 and "unfinished" in choice.skipped[0]


def test_after_an_interrupted_first_save_the_run_starts_over(root: Folder, tmp_path: Path) -> None:
    save(root, tmp_path, 5)
    root.delete("step-00000005/rank-0.json")
    choice = checkpoint.choose(root)
    assert choice.name is None and "unfinished" in choice.skipped[0]


def test_all_damaged_stops(root: Folder, tmp_path: Path) -> None:
    for step in (5, 10):
        save(root, tmp_path, step)
        root.write(f"step-{step:08d}/weights.safetensors", b"")
    with pytest.raises(RunError, match=r"all checkpoints(.|\n)*step-00000010(.|\n)*step-00000005"):
        checkpoint.choose(root)


def test_rotation_keeps_the_last_and_the_best(root: Folder, tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(root, tmp_path, step, loss=loss)
    assert checkpoint.rotate(root, 2, WATCHED) == ["step-00000001", "step-00000003"]
    assert checkpoint.best(root, WATCHED) == "step-00000002"
    assert root.names() == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_value_that_is_not_finite_is_never_the_best(root: Folder, tmp_path: Path) -> None:
    for step, loss in ((1, math.nan), (2, 2.0), (3, 1.0), (4, math.inf)):
        save(root, tmp_path, step, loss=loss)
    assert checkpoint.best(root, WATCHED) == "step-00000003"
    assert checkpoint.best(root, Metric("eval_loss", "max")) == "step-00000002"


def test_rotation_never_counts_an_unfinished_checkpoint(root: Folder, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(root, tmp_path, step)
    root.delete("step-00000003/rank-0.json")
    assert checkpoint.rotate(root, 1, WATCHED) == ["step-00000001"]
    assert root.names() == ["step-00000002", "step-00000003"]
    save(root, tmp_path, 4)
    assert checkpoint.rotate(root, 1, WATCHED) == ["step-00000002", "step-00000003"]


MANIFESTS: list[object] = [
    {"files": []},
    {"files": {"weights.safetensors": 3}},
    {"files": {"../weights.safetensors": "x"}},
    {"files": {"/etc/passwd": "x"}},
    {"files": {}, "world_size": "two"},
    {"files": {}, "world_size": 0},
    {"files": {}, "metrics": [1]},
    {"files": {}, "metrics": {"eval_loss": "low"}},
    {"files": {}, "format": "x"},
    [1],
    None,
]
"""What a manifest may not be."""


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_a_manifest_of_other_types_is_damage(
    root: Folder, tmp_path: Path, manifest: object
) -> None:
    save(root, tmp_path, 5, loss=1.0)
    save(root, tmp_path, 10, loss=2.0)
    root.write("step-00000010/rank-0.json", json.dumps(manifest).encode())
    choice = checkpoint.choose(root)
    assert choice.step == 5
    assert choice.skipped == ("step-00000010: damaged, rank-0.json cannot be read",)
    assert checkpoint.best(root, WATCHED) == "step-00000005"
    checkpoint.rotate(root, 1, WATCHED)


def test_more_ranks_than_manifests_is_unfinished(root: Folder, tmp_path: Path) -> None:
    save(root, tmp_path, 5)
    root.write("step-00000005/rank-0.json", b'{"files": {}, "world_size": 1000000000}')
    assert "unfinished" in checkpoint.choose(root).skipped[0]


def test_files_and_folders_in_each_others_place(root: Folder, tmp_path: Path) -> None:
    save(root, tmp_path, 5)
    save(root, tmp_path, 10)
    root.delete("step-00000010/weights.safetensors")
    (root / "step-00000010" / "weights.safetensors").create()
    root.write("step-00000011", b"a file")
    choice = checkpoint.choose(root)
    assert choice.step == 5 and len(choice.skipped) == 2
    assert "weights.safetensors is missing" in choice.skipped[1]


def test_a_diverged_metric_is_no_damage(root: Folder, tmp_path: Path) -> None:
    save(root, tmp_path, 5, loss=float("nan"))
    assert checkpoint.choose(root).step == 5


def test_a_checkpoint_that_could_not_be_loaded_is_passed_over(root: Folder, tmp_path: Path) -> None:
    for step in (5, 10):
        save(root, tmp_path, step)
    choice = checkpoint.choose(root, {"step-00000010": "unusable, x"})
    assert choice == checkpoint.Choice("step-00000005", 5, ("step-00000010: unusable, x",))
