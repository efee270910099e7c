"""The files of an export, its model card, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from support.finished_run import finished_run

from finray.training.common.errors import InputError, RunError
from finray.training.common.storage import Folder
from finray.training.export.export import export

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def exported(run: Path, to: str = "out", **how: Any) -> Path:
    return export(Folder(str(run)), run.parent.parent / to, **how).folder


def test_the_card(tiny_model: Path, tmp_path: Path) -> None:
    folder = exported(finished_run(tmp_path, tiny_model, name="acme/tiny", revision="v2"))
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.base_model == "acme/tiny" and data.library_name == "peft"
    assert data.pipeline_tag == "text-generation" and data.tags == ["finray", "sft", "lora"]
    assert "| exact match" not in card.text or "87.5%" in card.text
    for text in (
        "Supervised fine-tuning",
        "rank 4",
        "| held-out loss | 2.500 | 0.750 |",
        "| exact match | 0.0% | 87.5% |",
        "| Dropped: too long | 3 |",
        "finray 0.1.0",
        "chat.jsonl",
        "rows.jsonl",
        'revision="v2"',
    ):
        assert text in card.text, text
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["model"]["base"] == "acme/tiny" and recipe["storage"] == "runs"
    adapter = json.loads((folder / "adapter_config.json").read_bytes())
    assert adapter["base_model_name_or_path"] == "acme/tiny" and adapter["revision"] == "v2"


def test_the_card_names_nothing_of_this_machine(tmp_path: Path, tiny_model: Path) -> None:
    run = finished_run(tmp_path, tiny_model)
    for folder in (exported(run), exported(run, "merged", merge=True)):
        names = sorted(path.name for path in folder.iterdir())
        assert "tokenizer.json" in names and "chat_template.jinja" in names
        for path in folder.iterdir():
            if path.suffix == ".safetensors" or path.name == "adapter_config.json":
                continue  # the latter's path to a local base is what lets PEFT find it
            text = path.read_text(encoding="utf-8")
            for secret in (str(tmp_path), str(tiny_model), "/home/ada", "swordfish", "10.0.0.7"):
                assert secret not in text, (path, secret)
    data = ModelCard.load(tmp_path / "merged" / "README.md").data
    assert data.base_model is None and data.library_name == "transformers"
    assert (tmp_path / "merged" / "generation_config.json").exists()


def test_a_base_in_the_hub_s_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "models--acme--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = finished_run(tmp_path, tiny_model, name="acme/tiny")
    assert (exported(run, merge=True) / "model.safetensors").exists()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no model.safetensors"):
        exported(run, "again", merge=True)
    with pytest.raises(InputError, match=r"model.base: cannot fetch acme/other from the hub"):
        shutil.rmtree(run)
        exported(finished_run(tmp_path, tiny_model, name="acme/other"), "other", merge=True)


def test_another_type(tiny_model: Path, tmp_path: Path) -> None:
    folder = exported(finished_run(tmp_path, tiny_model, "model"), dtype="bfloat16")
    assert json.loads((folder / "config.json").read_bytes())["dtype"] == "bfloat16"
    actual = load_file(folder / "model.safetensors")
    expected = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name].bfloat16()) for name in expected)


def refusal(run: Path, **how: Any) -> str:
    with pytest.raises(InputError) as error:
        exported(run, **how)
    assert not (run.parent.parent / how.get("to", "out")).exists()
    return str(error.value)


def change_record(run: Path, **values: Any) -> None:
    record = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps({**record, **values}), encoding="utf-8")


def test_refusals(tiny_model: Path, tmp_path: Path) -> None:
    assert "holds no run" in refusal(tmp_path / "runs" / "nowhere")
    run = finished_run(tmp_path, tiny_model)
    assert "--dtype" in refusal(run, dtype="bfloat16")
    change_record(run, status="stopped", result=None, step=12)
    assert "not finished (status: stopped, step 12 of 60)" in refusal(run)
    change_record(run, status="finished", result="model")
    assert "the run's result folder model/ no longer exists" in refusal(run)


def test_a_whole_model_has_nothing_to_merge(tiny_model: Path, tmp_path: Path) -> None:
    assert "omit --merge" in refusal(finished_run(tmp_path, tiny_model, "model"), merge=True)


def test_a_base_that_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = finished_run(tmp_path, base)
    shutil.rmtree(base)
    assert f"recipe.yaml: model.base: there is no folder {base}" in refusal(run, merge=True)
    assert exported(run).is_dir()  # the adapter alone needs no base


def test_a_base_that_changed(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = finished_run(tmp_path, base)
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors")
    assert "weights have changed since the adapter was trained" in refusal(run, merge=True)


def test_a_folder_in_use_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        exported(run)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert (exported(run, "empty") / "adapter_model.safetensors").exists()


def test_a_failure_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, tiny_model)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finray.training.export.merge.write_model_files", full)
    with pytest.raises(RunError, match="No space left on device"):
        exported(run, merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
