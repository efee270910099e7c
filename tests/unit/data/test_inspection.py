"""The inspection: its results, what it refuses, and that it imports nothing heavy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.training.common.errors import InputError
from finray.training.inspection import inspect_recipe

from .conftest import MakeRecipe, chat_row, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", [chat_row(f"one {n}", "two") for n in range(50)])


@pytest.fixture
def bare_model(tmp_path: Path, model: Path) -> Path:
    """A copy of the model folder that a test may change."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_result(data: Path, tmp_path: Path, model: Path, make_recipe: MakeRecipe) -> None:
    held = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["one two three"] * 9}), held)
    inspection = inspect_recipe(make_recipe(train=data, eval=held))
    train, held_out = inspection.train[0], inspection.eval[0]
    assert (train.format, train.files, train.rows, train.is_exact) == ("messages", 1, 50, True)
    assert train.bytes == data.stat().st_size
    assert train.path == str(data)
    assert (held_out.format, held_out.rows) == ("text", 9)
    assert inspection.model_folder == model


def test_bad_first_rows_are_tolerated_unless_all_are_bad(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    good = [chat_row("one", "two")] * 40
    mixed = write_jsonl(tmp_path / "a.jsonl", [[1], {"messages": []}, *good])
    assert inspect_recipe(make_recipe(train=mixed)).train[0].rows == 42
    bad = write_jsonl(tmp_path / "b.jsonl", [{"messages": []}] * 300)
    with pytest.raises(InputError, match=r"b\.jsonl:1: messages is an empty .* first 200 rows"):
        inspect_recipe(make_recipe(train=bad))
    unreadable = write_jsonl(tmp_path / "c.jsonl", [1, 2])
    with pytest.raises(InputError, match=r"c\.jsonl:1: expected a JSON object, found int; none"):
        inspect_recipe(make_recipe(train=unreadable))
    blank = tmp_path / "d.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(InputError, match=r"d\.jsonl: the file has no rows"):
        inspect_recipe(make_recipe(train=blank))
    strange = write_jsonl(tmp_path / "e.jsonl", [[1], {"q": 1}])
    with pytest.raises(InputError, match=r"e\.jsonl:2: no row format has these keys: q"):
        inspect_recipe(make_recipe(train=strange))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "text"}, r"a\.jsonl: the file has no rows; expected at least one"),
        ({"limit": 3}, r"a\.jsonl: the file has no rows; expected at least one"),
        (
            {"format": "text", "map": {"file": "/m.py:m", "source": "def m(row): return None"}},
            "map: m leaves out every row; let it return those to learn from",
        ),
    ],
)
def test_a_source_without_rows(
    tmp_path: Path, make_recipe: MakeRecipe, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' if "map" in changes else "\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        inspect_recipe(make_recipe(train=[{"path": str(path), **changes}]))


def test_large_data_is_estimated(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps(chat_row("one " * 500, "two")) + "\n"
    count = 70 * 2**20 // len(row)
    with path.open("w") as stream:
        stream.writelines(row for _ in range(count))
    source = inspect_recipe(make_recipe(train=path)).train[0]
    assert not source.is_exact
    assert source.rows == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("packing", [True, False])
def test_less_data_than_a_batch(data: Path, make_recipe: MakeRecipe, packing: bool) -> None:
    optim = {"batch_size": 48}
    inspect_recipe(make_recipe(train=data, optim=optim, packing=packing))
    with pytest.raises(InputError, match=r"optim\.batch_size: 48 .* only 40 rows"):
        inspect_recipe(make_recipe(train=data, optim=optim, packing=packing, holdout=0.2))
    twice = [{"path": str(data), "weight": 2.0}]
    inspect_recipe(make_recipe(train=twice, optim={"batch_size": 100}, packing=packing))


def test_a_broken_row_comes_before_the_batch_size(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat_row("one", "two"), {"messages": []}])
    with pytest.raises(InputError, match=r"(?s)^1 of 2 rows cannot .*a\.jsonl:2: messages is an"):
        inspect_recipe(make_recipe(train=path, optim={"batch_size": 2, "micro_batch_size": 1}))
    recipe = make_recipe(
        train=path, optim={"batch_size": 2, "micro_batch_size": 1}, max_bad_rows=0.5
    )
    with pytest.raises(InputError, match=r"optim\.batch_size: 2 .* only 1 rows"):
        inspect_recipe(recipe)


def test_margins_are_checked(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": "wide"}
    path = write_jsonl(tmp_path / "a.jsonl", [row] * 40)
    inspect_recipe(make_recipe(train=path, method={"kind": "reward"}))
    with pytest.raises(InputError, match=r"a\.jsonl:1: gap is 'wide'; expected a number; none of"):
        inspect_recipe(make_recipe(train=path, method={"kind": "reward", "margin": "gap"}))


def test_long_texts_may_be_few(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two " * 1000}])
    inspect_recipe(make_recipe(train=path, method={"kind": "pretrain"}))


def test_model_folders_that_lack_something(
    data: Path, bare_model: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(train=data, base=bare_model)
    (bare_model / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="tokenizer has no chat template"):
        inspect_recipe(recipe)
    inspect_recipe(make_recipe(train=data, base=bare_model, chat_template="chatml"))
    (bare_model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="a model folder without a tokenizer"):
        inspect_recipe(recipe)
    (bare_model / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        inspect_recipe(recipe)


def test_damaged_model_files(data: Path, bare_model: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=data, base=bare_model)
    (bare_model / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a usable tokenizer"):
        inspect_recipe(recipe)
    (bare_model / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        inspect_recipe(recipe)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 32}, 32),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"max_position_embeddings": 16, "rope_scaling": {"factor": 2.0, "type": "yarn"}}, 32),
    ],
)
def test_max_length_beyond_the_positions_of_the_model(
    data: Path, bare_model: Path, make_recipe: MakeRecipe, config: dict[str, Any], positions: int
) -> None:
    (bare_model / "config.json").write_text(json.dumps(config))
    inspect_recipe(make_recipe(train=data, base=bare_model, max_length=positions))
    with pytest.raises(InputError, match=rf"data\.max_length: 33 .* at most {positions} "):
        inspect_recipe(make_recipe(train=data, base=bare_model, max_length=positions + 1))


def test_chatml_without_its_tokens(data: Path, bare_model: Path, make_recipe: MakeRecipe) -> None:
    text = (bare_model / "tokenizer.json").read_text()
    (bare_model / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|begin|>"))
    with pytest.raises(InputError, match=r"chatml needs the tokens <\|im_start\|>, which"):
        inspect_recipe(make_recipe(train=data, base=bare_model, chat_template="chatml"))


def test_hub_model_that_is_not_cached_is_skipped(data: Path, make_recipe: MakeRecipe) -> None:
    inspection = inspect_recipe(make_recipe(train=data, base="no-such/model"))
    assert inspection.model_folder is None


def test_nothing_heavy_is_imported(data: Path, model: Path) -> None:
    program = f"""
import sys
from finray.training.inspection import inspect_recipe
from finray.training.config.recipe import recipe_from_dict
inspect_recipe(recipe_from_dict({{
    "name": "t", "model": {{"base": {str(model)!r}}},
    "data": {{"train": [{{"path": {str(data)!r}}}], "max_length": 64}},
}}))
print(sorted({{"torch", "transformers", "ray"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"
