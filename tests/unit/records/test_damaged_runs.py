"""Damaged files of a run are named in one message, and an unusable checkpoint is passed over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finray.cluster.cli.main import main
from finray.training.common.background import Stop
from finray.training.common.errors import InputError, RunError
from finray.training.common.storage import Folder
from finray.training.config.recipe import load_recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records import checkpoint
from finray.training.records.run_folder import finished_run, read_run
from finray.training.run import train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 6
NEWEST = "step-00000004"


@pytest.fixture(scope="module")
def started(tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a run that was killed after step 5; only read."""
    folder = tmp_path_factory.mktemp("started")
    content = {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 2, "dropout": 0.1},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 64},
        "optim": {"batch_size": 4, "micro_batch_size": 4, "max_steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "log": {"every_steps": 1, "to": []},
        "scale": {"workers": 0},
        "storage": str(folder),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    run = folder / "run"
    (run / "adapter").rename(folder / "expected")
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    record = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    return folder


@pytest.fixture
def storage(started: Path, tmp_path: Path) -> Path:
    """A copy of the storage, with a recipe that uses it."""
    shutil.copytree(started, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace(str(started), str(tmp_path)), encoding="utf-8")
    return tmp_path


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


def change(**values: Any) -> Callable[[Path], object]:
    """Change run.json."""

    def apply(run: Path) -> None:
        record = json.loads((run / "run.json").read_bytes())
        (run / "run.json").write_text(json.dumps({**record, **values}), encoding="utf-8")

    return apply


def as_folder(name: str) -> Callable[[Path], object]:
    return lambda run: ((run / name).unlink(), (run / name).mkdir())


def as_file(name: str) -> Callable[[Path], object]:
    return lambda run: (shutil.rmtree(run / name), (run / name).write_text("x"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "run.json empty": (write("run.json", b""), "run.json: expected a JSON object"),
    "run.json binary": (write("run.json", b"\xff\xfe\0\1"), "run.json: expected a JSON object"),
    "run.json deep": (write("run.json", b"[" * 100_000), "run.json: expected a JSON object"),
    "run.json a folder": (as_folder("run.json"), "run.json: cannot be read"),
    "run.json gone": (lambda run: (run / "run.json").unlink(), "but no run.json"),
    "a newer format": (change(format=99), "run.json: a newer finray wrote this file"),
    "another format": (change(format="x"), "run.json: format: expected a number, not 'x'"),
    "step": (change(step="four"), "run.json: step: expected a whole number, not 'four'"),
    "status": (change(status=[1]), "run.json: status: expected text, not [1]"),
    "metrics": (change(metrics=3), "run.json: metrics: expected an object, not 3"),
    "restarts": (change(restarts=["x"]), "run.json: restarts: expected an object, not 'x'"),
    "restart": (change(restarts=[{"step": None}]), "run.json: restarts: step: expected a whole"),
    "world sizes": (change(world_sizes="2"), "run.json: world_sizes: expected a list, not '2'"),
    "micro batch": (change(micro_batch_size=True), "micro_batch_size: expected a whole number"),
    "recipe gone": (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml: missing or empty"),
    "recipe empty": (write("recipe.yaml", b""), "recipe.yaml: missing or empty"),
    "recipe binary": (write("recipe.yaml", b"\xff\xfe\0"), "recipe.yaml: not a YAML file"),
    "recipe a list": (write("recipe.yaml", b"[1]"), "recipe.yaml: missing or empty"),
    "recipe other": (write("recipe.yaml", b"a: 1"), "recipe.yaml: name: Field required"),
    "metrics garbage": (
        write("metrics.jsonl", b'{"step": 1}\n\xff\xfe\n'),
        "metrics.jsonl:2: expected a JSON object",
    ),
    "metrics without a step": (
        write("metrics.jsonl", b'{"loss": 1.0}\n'),
        "metrics.jsonl: line 1: step: expected a whole number, not None",
    ),
    "metrics of another type": (
        write("metrics.jsonl", b'{"step": 1, "loss": "low"}\n'),
        "metrics.jsonl: line 1: loss: expected a number, not 'low'",
    ),
    "metrics a folder": (as_folder("metrics.jsonl"), "metrics.jsonl: cannot be read"),
    "rollouts": (
        write("rollouts.jsonl", b'{"prompt": "x"}\n'),
        "rollouts.jsonl: line 1: step: expected a whole number",
    ),
    "samples": (write("samples.jsonl", b"1\n"), "samples.jsonl:1: expected a JSON object"),
    "checkpoints a file": (as_file("checkpoints"), "checkpoints: a file, where the run needs"),
}
"""By what is wrong with the folder of a run: how it is made so, and the message."""


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file_is_named(
    storage: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[what]
    damage(storage / "run")
    assert main(["train", str(storage / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{storage}/run" in error and message in error
    assert "Traceback" not in error and error.count("\n") == 1


def test_a_file_where_the_run_belongs(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(storage / "run")
    (storage / "run").write_text("x")
    assert main(["train", str(storage / "recipe.yaml")]) == 2
    assert f"{storage}/run; give another folder" in capsys.readouterr().err


def test_a_result_without_its_recipe(storage: Path) -> None:
    run = storage / "run"
    shutil.copytree(storage / "expected", run / "adapter")
    change(status="finished")(run)
    assert finished_run(Folder(str(run))).kind == "adapter"
    for content in (b"", b"model: 3", b"model: {base: [1]}"):
        (run / "recipe.yaml").write_bytes(content)
        with pytest.raises(InputError, match=r"recipe\.yaml: not a run's recipe: model\.base"):
            finished_run(Folder(str(run)))


def resigned(folder: Path) -> None:
    """Write the manifest again, so that all hashes are right."""
    (folder / "rank-0.json").unlink()
    (folder / "rank-0.json").write_bytes(checkpoint.make_manifest(folder, 0, 1, {}))


def saved(name: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: torch.save(value, folder / name)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "optimizer empty": (write("optimizer.pt", b""), "optimizer.pt"),
    "optimizer garbage": (write("optimizer.pt", b"\x80garbage" * 50), "optimizer.pt"),
    "optimizer of another type": (saved("optimizer.pt", [1, 2]), "optimizer.pt"),
    "scheduler": (write("scheduler.pt", b"garbage"), "scheduler.pt"),
    "scaler": (write("scaler.pt", b"garbage"), "scaler.pt"),
    "random state": (write("rng_state.pth", b"garbage"), "rng_state"),
    "random state of another type": (saved("rng_state.pth", {"python": 1}), "rng_state"),
    "weights": (write("adapter_model.safetensors", b"garbage"), "the weights"),
    "position": (write("position.json", b"[1]"), "position.json"),
    "position of another step": (write("position.json", b'{"step": 7}'), "position.json"),
    "state": (write("trainer_state.json", b"{"), "trainer_state.json"),
}
"""By what is wrong with a checkpoint: how it is made so, and the file that is named."""


@pytest.mark.long
@pytest.mark.parametrize("what", UNUSABLE)
def test_an_unusable_checkpoint_is_passed_over(storage: Path, what: str) -> None:
    damage, file = UNUSABLE[what]
    run = storage / "run"
    damage(run / "checkpoints" / NEWEST)
    resigned(run / "checkpoints" / NEWEST)
    train(load_recipe(storage / "recipe.yaml"), InProcessLauncher())
    record = read_run(Folder(str(run))) or {}
    reasons = [restart["reason"] for restart in record["restarts"]]
    assert record["status"] == "finished"
    assert "resumed from step-00000002" in reasons[-1]
    assert f"{NEWEST}: unusable, {file} cannot be loaded" in reasons[-1]
    expected = load_file(storage / "expected" / "adapter_model.safetensors")
    actual = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_all_unusable_ends_the_run(storage: Path) -> None:
    for folder in (storage / "run" / "checkpoints").iterdir():
        (folder / "optimizer.pt").write_bytes(b"")
        resigned(folder)
    with pytest.raises(RunError, match=r"are damaged:\n.*unusable(.|\n)*step-00000002: unusable"):
        train(load_recipe(storage / "recipe.yaml"), InProcessLauncher())


def test_a_deleted_folder_ends_the_run(storage: Path) -> None:
    run = storage / "run"
    shutil.rmtree(run)

    def delete(line: dict[str, float]) -> None:
        if line["step"] == 1:
            shutil.rmtree(run)

    launcher = InProcessLauncher(Stop(), report=delete)
    with pytest.raises(RunError, match=rf"{run}: the run's folder, .* was deleted while the run"):
        train(load_recipe(storage / "recipe.yaml"), launcher)
    assert not (run / "run.json").exists() and not (run / "checkpoints").exists()
