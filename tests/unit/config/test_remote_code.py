"""Python code and pickles of models: neither runs unless the recipe allows it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finray.training.common.errors import InputError
from finray.training.config.adapter_folder import check_safetensors
from finray.training.config.models import ModelSettings
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict
from finray.training.config.remote_code import check_pinned, check_remote_code
from finray.training.inspection import inspect_recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.loading import load_model
from finray.training.run import train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class ForeignConfig(LlamaConfig):
    model_type = "foreign"


class ForeignForCausalLM(LlamaForCausalLM):
    config_class = ForeignConfig
"""
AUTO_MAP = {
    "AutoConfig": "foreign.ForeignConfig",
    "AutoModelForCausalLM": "foreign.ForeignForCausalLM",
}


class Foreign:
    """A model whose own code writes a file when it runs."""

    def __init__(self, tiny_model: Path, folder: Path) -> None:
        self.folder = folder / "foreign"
        self.mark = folder / "ran"
        shutil.copytree(tiny_model, self.folder)
        self.code = self.folder / "foreign.py"
        self.code.write_text(CODE.format(mark=str(self.mark)), encoding="utf-8")
        self.change(auto_map=AUTO_MAP, model_type="foreign")

    def change(self, **values: Any) -> None:
        file = self.folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**content, **values}), encoding="utf-8")

    def recipe(self, data: Path, **model: Any) -> Recipe:
        return recipe_from_dict(
            {
                "name": "run",
                "model": {"base": str(self.folder), **model},
                "adapter": {"rank": 4},
                "data": {"train": [{"path": str(data)}], "max_length": 128},
                "optim": {"batch_size": 4, "micro_batch_size": 4, "max_steps": 1},
                "scale": {"workers": 0},
                "storage": str(self.folder.parent / "runs"),
            }
        )


@pytest.fixture
def foreign(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Foreign:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    return Foreign(tiny_model, tmp_path)


def test_code_of_a_models_own_is_refused(foreign: Foreign, chat_file: Path) -> None:
    with pytest.raises(
        InputError, match=r"config\.json: auto_map refers to .*foreign\.ForeignConfig"
    ):
        inspect_recipe(foreign.recipe(chat_file))
    with pytest.raises((InputError, ValueError), match=r"custom code|cannot load"):
        load_model(foreign.recipe(chat_file))
    assert not foreign.mark.exists()


def test_trusted_code_runs_and_is_named(foreign: Foreign, chat_file: Path) -> None:
    recipe = foreign.recipe(chat_file, trust_remote_code=True)
    record = train(recipe, InProcessLauncher())
    assert record["status"] == "finished" and foreign.mark.exists()
    digest = hashlib.sha256(foreign.code.read_bytes()).hexdigest()
    assert record["model_code"] == {str(foreign.code): digest}


def test_a_model_type_of_transformers_needs_no_code(foreign: Foreign, chat_file: Path) -> None:
    foreign.change(model_type="llama")
    inspect_recipe(foreign.recipe(chat_file))
    load_model(foreign.recipe(chat_file))
    assert not foreign.mark.exists()


def test_a_hub_model_needs_a_pinned_commit(tmp_path: Path, chat_file: Path) -> None:
    text = f"""
name: run
model: {{base: owner/name, trust_remote_code: true, revision: REVISION}}
data: {{train: [{{path: {chat_file}}}]}}
"""
    path = tmp_path / "recipe.yaml"
    for revision in ("null", "main", "'0123456'"):
        path.write_text(text.replace("REVISION", revision), encoding="utf-8")
        with pytest.raises(InputError, match=r"model\.revision to the full hash of a commit"):
            load_recipe(path)
    path.write_text(text.replace("REVISION", "'" + "0a" * 20 + "'"), encoding="utf-8")
    assert load_recipe(path).model.trust_remote_code
    check_pinned(ModelSettings(base=str(tmp_path), trust_remote_code=True))


def test_code_of_another_repository_is_not_pinned(foreign: Foreign) -> None:
    foreign.change(auto_map={"AutoConfig": "owner/other--foreign.ForeignConfig"})
    model = ModelSettings(base=str(foreign.folder), trust_remote_code=True)
    with pytest.raises(InputError, match="owner/other--foreign"):
        check_remote_code(model, foreign.folder)


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path, chat_file: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    values = {
        "name": "run",
        "model": {"base": str(base)},
        "data": {"train": [{"path": str(chat_file)}]},
    }
    with pytest.raises(InputError, match="cannot load"):
        load_model(recipe_from_dict(values))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickled"):
        check_safetensors(tmp_path, "model.adapter")
