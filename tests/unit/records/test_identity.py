"""A run goes on only from the files and the commits that it was started from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.hub import COMMIT, serving

from finray.cluster.cli.main import main
from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.data.hub import _commit
from finray.training.models.base_cache import BaseCache
from finray.training.records.identity import (
    at_commits,
    changed_files,
    hub_commits,
    identity_of,
)

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COMMITS = "a" * 40, "b" * 40


def scale_weights(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.05 for name, tensor in tensors.items()}, file, {"format": "pt"})


def append(file: Path, text: str) -> None:
    file.write_text((file.read_text() if file.exists() else "") + text, encoding="utf-8")


def change_config(base: Path, name: str = "config.json", **values: Any) -> None:
    file = base / name
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}), encoding="utf-8")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (scale_weights, "model.safetensors has another content"),
    "config": (
        lambda base: change_config(base, rms_norm_eps=0.1),
        "config.json: rms_norm_eps: 1e-06 before, 0.1 now",
    ),
    "stop": (
        lambda base: change_config(base, "generation_config.json", eos_token_id=5),
        "generation_config.json has another content",
    ),
    "template": (
        lambda base: append(base / "chat_template.jinja", "{# new #}"),
        "chat_template.jinja has another content",
    ),
    "tokens": (
        lambda base: append(base / "added_tokens.json", "{}"),
        "added_tokens.json is new",
    ),
}
"""By what is changed in a base's folder: how, and what the refusal says."""


def recipe_file(folder: Path, base: Path, data: Path | dict[str, str], **values: Any) -> Path:
    path = folder / "recipe.yaml"
    content = {
        "name": "run",
        "model": {"base": str(base)},
        "adapter": {"rank": 2},
        "data": {
            "train": [data if isinstance(data, dict) else {"path": str(data)}],
            "max_length": 128,
        },
        "optim": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 2},
        "checkpoint": {"every_steps": 1},
        "log": {"every_steps": 1, "to": []},
        "scale": {"workers": 0},
        "storage": str(folder / "runs"),
        **values,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def undo_last_step(run: Path) -> None:
    """Make the run look as if it was killed after its first step."""
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "adapter")
    change_config(run, "run.json", status="running")


@pytest.fixture(scope="module")
def started(tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a recipe, and its run, killed after a step; only read."""
    folder = tmp_path_factory.mktemp("started")
    base = shutil.copytree(tiny_model, folder / "base")
    change_config(base, "generation_config.json")
    assert main(["train", str(recipe_file(folder, base, chat_file))]) == 0
    undo_last_step(folder / "runs" / "run")
    return folder


def moved(started: Path, to: Path) -> tuple[Path, Path]:
    """The folder of a copy of the started run, with its recipe; paths that it holds are changed."""
    shutil.copytree(started, to, dirs_exist_ok=True)
    for file in (to / "recipe.yaml", *(to / "runs" / "run").glob("r*.*")):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(str(started), str(to)), encoding="utf-8")
    return to / "base", to / "recipe.yaml"


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_refuses_to_go_on_from_other_files(
    started: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, recipe = moved(started, tmp_path)
    change, reason = CHANGES[what]
    change(base)
    assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert f"model.base {base}/{reason}" in message
    assert message.count("\n  model.base") == 1


def test_a_run_goes_on_from_a_copy_of_the_same_files(started: Path, tmp_path: Path) -> None:
    _, recipe = moved(started, tmp_path)
    assert main(["train", str(recipe)]) == 0
    record = json.loads((tmp_path / "runs" / "run" / "run.json").read_bytes())
    assert record["status"] == "finished" and record["restarts"][0]["step"] == 1


def test_without_a_checkpoint_the_new_files_count(started: Path, tmp_path: Path) -> None:
    base, recipe = moved(started, tmp_path)
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    scale_weights(base)
    assert main(["train", str(recipe)]) == 0
    record = json.loads((tmp_path / "runs" / "run" / "run.json").read_bytes())
    present = identity_of(recipe_from_dict(yaml.safe_load(recipe.read_text(encoding="utf-8"))))
    assert record["identity"] == present


def in_cache(cache: Path, tiny_model: Path, commit: str) -> Path:
    """The snapshot of acme/tiny at a commit, which becomes the main branch's."""
    folder = cache / "models--acme--tiny"
    snapshot = folder / "snapshots" / commit
    shutil.copytree(tiny_model, snapshot)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.filterwarnings("ignore:Could not find a config file in acme/tiny")
def test_a_hub_model_stays_at_its_commit(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    in_cache(tmp_path / "cache", tiny_model, COMMITS[0])
    path = recipe_file(tmp_path, Path("acme/tiny"), chat_file)
    run = tmp_path / "runs" / "run"
    assert main(["train", str(path)]) == 0
    expected = load_file(run / "adapter" / "adapter_model.safetensors")
    undo_last_step(run)
    scale_weights(in_cache(tmp_path / "cache", tiny_model, COMMITS[1]))
    assert main(["train", str(path)]) == 0
    record = json.loads((run / "run.json").read_bytes())
    assert record["commits"] == {"acme/tiny": COMMITS[0]}
    actual = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((actual[name] == tensor).all() for name, tensor in expected.items())
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["revision"] == COMMITS[0]


@pytest.mark.long
def test_a_hub_data_set_stays_at_its_commit(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chat_file.read_bytes()
    with serving() as hub:
        hub.use(monkeypatch)
        hub.datasets["org/chats"] = {"train.jsonl": rows}
        path = recipe_file(tmp_path, tiny_model, {"dataset": "org/chats"})
        run = tmp_path / "runs" / "run"
        assert main(["train", str(path)]) == 0
        expected = load_file(run / "adapter" / "adapter_model.safetensors")
        undo_last_step(run)
        shutil.rmtree(tmp_path / "runs" / "prepared")
        hub.move(
            "org/chats", COMMITS[1], {"train.jsonl": rows[: len(rows) // 2], "bad.jsonl": b"?"}
        )
        _commit.cache_clear()
        assert main(["check", str(path)]) == 0
        assert main(["train", str(path)]) == 0
    record = json.loads((run / "run.json").read_bytes())
    assert record["commits"] == {"datasets/org/chats": COMMIT}
    assert record["data"]["sources"][0]["commit"] == COMMIT
    assert record["restarts"][0]["step"] == 1
    actual = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((actual[name] == tensor).all() for name, tensor in expected.items())


def test_each_name_of_a_hub_data_set_is_pinned(tmp_path: Path, tiny_model: Path) -> None:
    sources = [
        {"dataset": "org/a", "subset": "en", "revision": "v1"},
        {"path": "hf://datasets/org/a@main/x.jsonl"},
        {"dataset": "org/a", "revision": COMMIT},
        {"path": "/x"},
    ]
    noted = {
        "datasets/org/a/en@v1": COMMITS[0],
        "datasets/org/a@main/x.jsonl": COMMITS[1],
    }
    curate = [{"kind": "decontaminate", "against": [{"dataset": "org/b"}]}]
    data = {"train": sources, "eval": [{"dataset": "org/b"}], "curate": curate}
    recipe = recipe_of(tiny_model, data=data)
    pinned = at_commits(recipe, {**noted, "datasets/org/b": COMMIT})
    train = [COMMITS[0], f"hf://datasets/org/a@{COMMITS[1]}/x.jsonl", COMMIT, "/x"]
    assert {key: source.revision or source.path for key, source in pinned.data.sources} == {
        **{f"data.train.{n}": place for n, place in enumerate(train)},
        "data.eval.0": COMMIT,
        "data.curate.0.against.0": COMMIT,
    }
    assert hub_commits(pinned) == {}  # without a question to the hub


def recipe_of(base: Path | str, **values: Any) -> Recipe:
    return recipe_from_dict(
        {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "/x"}]}, **values}
    )


def test_named_models_are_pinned_too(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    in_cache(tmp_path, tiny_model, COMMITS[0])
    recipe = recipe_of(tiny_model, method={"kind": "dpo", "reference_model": "acme/tiny"})
    commits = hub_commits(recipe)
    assert commits == {"acme/tiny": COMMITS[0]}
    in_cache(tmp_path, tiny_model, COMMITS[1])
    assert hub_commits(recipe, commits) == commits
    pinned = at_commits(recipe, commits)
    assert pinned.method.reference_name == f"acme/tiny@{COMMITS[0]}"
    assert at_commits(pinned, hub_commits(pinned)) == pinned
    place = "method.reference_model acme/tiny"
    assert identity_of(pinned)[place] == {"commit": COMMITS[0]}
    rewards = [{"model": "acme/tiny", "weight": 2.0}, {"run": "/r"}]
    online = recipe_of(tiny_model, method={"kind": "grpo", "rewards": rewards})
    pinned = at_commits(online, commits)
    assert pinned.method.models == {"method.rewards[0].model": f"acme/tiny@{COMMITS[0]}"}
    assert pinned.method.runs == {"method.rewards[1].run": "/r"}


def test_a_reference_and_the_base_of_its_adapter_count(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    save_file(load_file(tiny_model / "model.safetensors"), adapter / "adapter_model.safetensors")
    recipe = recipe_of(tiny_model, method={"kind": "dpo", "reference_model": str(adapter)})
    before = identity_of(recipe)
    scale_weights(base)
    change_config(adapter, "adapter_config.json", r=8)
    key = "method.reference_model"
    assert changed_files(before, identity_of(recipe)) == [
        f"  {key} {adapter}/adapter_config.json has another content",
        f"  {key} {base}/model.safetensors has another content",
    ]


def test_a_kept_base_is_not_reused_after_a_change(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    recipe = recipe_of(base, adapter={"rank": 2})

    class Kept:
        def unload(self) -> str:
            return "kept"

    cache = BaseCache()
    cache.put(recipe, Kept())  # type: ignore[arg-type]
    assert cache.take(recipe) == "kept"
    cache.put(recipe, Kept())  # type: ignore[arg-type]
    scale_weights(base)
    assert cache.take(recipe) is None


def test_a_name_that_is_no_hub_id_is_refused_under_its_key(tiny_model: Path) -> None:
    recipe = recipe_of(tiny_model, method={"kind": "dpo", "reference_model": "acme/nowhere"})
    with pytest.raises(InputError, match=r"^method\.reference_model: cannot fetch acme/nowhere"):
        hub_commits(recipe)
