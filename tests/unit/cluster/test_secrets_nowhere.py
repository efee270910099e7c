"""Secrets in every input must not appear in anything that a run writes or prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.cluster.cli.main import main
from finray.training.common.storage import Folder

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SECRETS = {
    "HF_TOKEN": "hf_" + "a1B2" * 8,
    "WANDB_API_KEY": "0f9e8d7c6b" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPx",
    "RAY_AUTH_TOKEN": "5d41402abc4b2a76b9719d911017c592",
}
REWARD = """
import os

LEAK = "{leak}"

def worth(prompts, completions, completion_ids, **columns):
    raise RuntimeError("cannot log in with " + os.environ["WANDB_API_KEY"])
"""


class Runner:
    """Runs commands, and keeps what they print."""

    def __init__(self, folder: Path, base: Path, data: Path, capture: Any) -> None:
        self.folder = folder
        self.base = base
        self.data = data
        self.printed = ""
        self._capture = capture

    def recipe(self, name: str, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": name,
            "model": {"base": str(self.base)},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": str(self.data)}], "max_length": 128, "packing": False},
            "optim": {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2},
            "checkpoint": {"every_steps": 1},
            "scale": {"workers": 0},
            "storage": "runs",
            **changes,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        exit_code = main([str(argument) for argument in arguments])
        output = "".join(self._capture.readouterr())
        self.printed += output
        assert exit_code == code, output
        return output

    def leaks(self) -> Iterator[str]:
        """Files that contain a secret, except recipes, which hold some as input."""
        for name, value in SECRETS.items():
            if value in self.printed:
                yield f"{name} was printed"
            for file in self.folder.rglob("*"):
                given = file.parent == self.folder and file.suffix in (".yaml", ".py")
                if file.is_file() and not given and value.encode() in file.read_bytes():
                    yield f"{name} in {file}"


@pytest.fixture
def finray(
    tmp_path: Path,
    tiny_model: Path,
    chat_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    monkeypatch.chdir(tmp_path)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return Runner(tmp_path, tiny_model, chat_file, capsys)


@pytest.mark.long
def test_from_the_environment(finray: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that finish, runs that fail with secrets in the error, and all commands that print."""
    recipe = finray.recipe("good")
    for command in ("check", "prepare", "train"):
        finray(command, recipe, "--json")
    finray("report", "runs/good")
    cloud = finray.recipe(
        "cloud",
        model={"base": "owner/name"},
        data={"train": [{"path": "s3://bucket/rows.jsonl"}]},
        scale={"workers": 1},
        storage="s3://bucket/runs",
    )
    finray("k8s", "render", cloud, "--to", "rendered.txt")
    finray("export", "runs/good", "--to", "exported")

    with monkeypatch.context() as patch:

        def upload(folder: Folder, source: Path) -> None:
            raise OSError(f"refused {' '.join(SECRETS.values())} for {folder} and {source}")

        patch.setattr(Folder, "upload", upload)
        patch.setattr("finray.training.common.uploader.PAUSES", ())
        output = finray("train", finray.recipe("failed"), code=1)
    assert "[secret]" in output
    record = json.loads((finray.folder / "runs/failed/run.json").read_text(encoding="utf-8"))
    assert "[secret]" in record["error"] and "[secret]" in record["save_error"]

    (finray.folder / "rewards.py").write_text(REWARD.format(leak=""), encoding="utf-8")
    method = {
        "kind": "grpo",
        "rewards": [{"file": "rewards.py:worth"}],
        "generations": 2,
        "max_completion": 4,
    }
    output = finray("train", finray.recipe("rewarded", method=method), code=1)
    assert "cannot log in with [secret]" in output
    finray("report", "runs/failed")
    finray("runs", "--json")
    assert not list(finray.leaks())


@pytest.mark.parametrize("name", SECRETS)
def test_from_the_recipe(finray: Runner, name: str) -> None:
    """As a value, in a URL, as a key of its own, in an override, and in a Python file."""
    secret = SECRETS[name]
    method = {"kind": "grpo", "rewards": [{"file": "rewards.py:worth"}], "generations": 2}
    (finray.folder / "rewards.py").write_text(REWARD.format(leak=secret), encoding="utf-8")
    given: list[dict[str, Any]] = [
        {"storage": f"s3://bucket/runs?secret_key={secret}"},
        {"data": {"train": [{"path": f"https://user:{secret}@host/rows.jsonl"}]}},
        {"model": {"base": str(finray.base), "revision": secret}},
        {name.lower(): secret},
        {"model": {"base": str(finray.base), "token": secret}},
        {"method": method},
    ]
    for changes in given:
        recipe = finray.recipe("given", **changes)
        for command in ("check", "train"):
            finray(command, recipe, code=2)
        finray("k8s", "render", recipe, "--to", "rendered.txt", code=2)
    finray("train", finray.recipe("given"), "--set", f"storage=s3://b/r?token={secret}", code=2)
    assert not list(finray.leaks()) and not (finray.folder / "runs").exists()
