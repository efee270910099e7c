"""The fingerprint changes when the prepared data would, and only then."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finray.training.common.errors import InputError
from finray.training.data.contents import is_unchanged
from finray.training.data.fingerprint import fingerprint
from finray.training.data.resolve import identified_data

from .conftest import MakeRecipe, chat_row, write_jsonl

ROWS = [chat_row(f"q {n}", "a") for n in range(3)]

FUNCTION = "def f(row):\n    return row\ng = f\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", ROWS)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 32},
        {"packing": False},
        {"overlong": "truncate"},
        {"holdout": 0.5},
        {"chat_template": "chatml"},
        {"max_row_bytes": 2048},
        {"method": {"kind": "pretrain"}},
        {"method": {"kind": "sft", "train_on": "all"}},
    ],
)
def test_settings_that_matter(data: Path, make_recipe: MakeRecipe, change: dict[str, Any]) -> None:
    assert fingerprint(make_recipe(train=data)) != fingerprint(make_recipe(train=data, **change))


def test_a_margin_matters(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "x": 1, "y": 2}
    data = write_jsonl(tmp_path / "a.jsonl", [pair])
    margins = (None, "x", "y", ["x", "y"], ["y", "x"])
    methods = [{"kind": "reward", "margin": margin} for margin in margins]
    prints = {fingerprint(make_recipe(train=data, method=method)) for method in methods}
    assert len(prints) == len(methods)


def test_sources_matter(data: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    second = write_jsonl(tmp_path / "b.jsonl", ROWS[::-1])
    source = {"path": str(data)}
    prints = [
        fingerprint(make_recipe(**settings))
        for settings in (
            {"train": data},
            {"train": second},
            {"train": [{**source, "weight": 2.0}]},
            {"train": [source, {"path": str(second)}]},
            {"train": [{"path": str(second)}, source]},
            {"train": data, "eval": second},
            {"train": [{**source, "format": "sharegpt"}]},
            {"train": [{**source, "limit": 2}]},
            {"train": [{**source, "system": "Be brief."}]},
            {"train": [{**source, "columns": {"messages": "messages"}}]},
            {"train": [{**source, "roles": {"bot": "assistant"}}]},
            {"train": [{**source, "map": {"file": "a.py:f", "source": FUNCTION}}]},
            {"train": [{**source, "map": {"file": "a.py:g", "source": FUNCTION}}]},
            {"train": [{**source, "map": {"file": "a.py:f", "source": FUNCTION + "#"}}]},
        )
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in prints)


def test_what_does_not_matter(data: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    key = fingerprint(make_recipe(train=data))
    copy = shutil.copy(data, tmp_path / "copy.jsonl")
    os.utime(data, (1, 1))
    recipe = make_recipe(train=copy, optim={"learning_rate": 1.0}, max_bad_rows=0.5)
    assert fingerprint(recipe.model_copy(update={"seed": 7, "name": "other"})) == key
    named = make_recipe(train=[{"path": str(data), "format": "messages"}])
    assert fingerprint(named) == key


def test_the_tokenizer_matters_and_the_weights_do_not(
    data: Path, tmp_path: Path, model: Path, make_recipe: MakeRecipe
) -> None:
    key = fingerprint(make_recipe(train=data))
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    save_file({"number": np.zeros(1, np.float32)}, moved / "model.safetensors")
    (moved / "config.json").write_text("{}")
    recipe = make_recipe(train=data, base=moved)
    assert fingerprint(recipe) == key
    changed = json.loads((moved / "tokenizer_config.json").read_text())
    changed["eos_token"] = "<|pad|>"
    (moved / "tokenizer_config.json").write_text(json.dumps(changed))
    assert fingerprint(recipe) != key


@pytest.mark.parametrize("cacheable_after", [2.0, 0.0])
def test_content_matters(
    cacheable_after: float, data: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content counts, not the modification time, also if hashes of files are cached."""
    monkeypatch.setattr("finray.training.data.contents._CACHEABLE_SECONDS", cacheable_after)
    recipe = make_recipe(train=data)
    key = fingerprint(recipe)
    before = data.stat()
    text = data.read_text()
    time.sleep(0.05)  # beyond the resolution of a file's times
    data.write_text(text.replace("q 1", "q 7"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(recipe) != key
    time.sleep(0.05)
    data.write_text(text)
    assert fingerprint(recipe) == key


def test_a_large_streamed_file_is_its_size_time_and_parts(
    data: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time, as an edit beside the parts would change rows without a word."""
    sizes = {"_READ_WHOLE": 9, "_PARTS": 3, "_PART": 4, "_CACHEABLE_SECONDS": 0.0}
    for name, value in sizes.items():
        monkeypatch.setattr(f"finray.training.data.contents.{name}", value)
    streams = make_recipe(train=data, prepare="streaming", optim={"max_steps": 1})
    key, text, before = fingerprint(streams), data.read_text(), data.stat()
    (file,) = identified_data(streams).train[0].files
    assert is_unchanged(file)
    for other in (f"{text}\n", text.replace("q 0", "q 9")):
        time.sleep(0.05)  # beyond the resolution of a file's times
        data.write_text(other)
        assert fingerprint(streams) != key and not is_unchanged(file)
    data.write_text(f"{text[:-2]} \n")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(streams) != key
    data.write_text(text)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(streams) == key and is_unchanged(file)


def test_a_missing_model_is_an_error(data: Path, make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"model\.base: there is no folder /nowhere"):
        fingerprint(make_recipe(train=data, base="/nowhere"))
    with pytest.raises(InputError, match=r"model\.base: cannot fetch no-such/model from the hub"):
        fingerprint(make_recipe(train=data, base="no-such/model"))
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        fingerprint(make_recipe(train=data, base="not/a/hub/id"))
