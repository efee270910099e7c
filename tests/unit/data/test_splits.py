"""Which rows a folder, a split, a slice and a limit give; the kinds of files they are in."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.training.common.errors import InputError
from finray.training.config.resolved_sources import resolve_sources
from finray.training.config.sections import DataSettings
from finray.training.config.source import Source
from finray.training.data.expand import expand
from finray.training.data.reading import count_rows, first_line, read_chunk
from finray.training.data.resolve import all_rows, resolve_data
from finray.training.data.row_changes import UNCHANGED
from finray.training.data.rows import BadRow
from finray.training.data.sources import MOST_ROWS, plan_chunks

from .conftest import MakeRecipe

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(100)]


def rows_of(**source: Any) -> list[Any]:
    files = expand(Source(**source)).files
    return [row for _, row in all_rows(files, UNCHANGED, 2**20)]


def numbers(**source: Any) -> list[int]:
    return [int(row["prompt"][1:]) for row in rows_of(**source)]


def write(path: Path, rows: list[Any]) -> Path:
    """Rows in the kind of file that the name tells; a few in each part of a columnar one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_file if kind == ".feather" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return path


KINDS = [".jsonl", ".json", ".csv", ".parquet", ".arrow"]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_limits_of_every_kind(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finray.training.data.sources.CHUNK_BYTES", 300)
    write(tmp_path / f"train-0{kind}", ROWS[:50])
    write(tmp_path / f"train-1{kind}", ROWS[50:80])
    write(tmp_path / f"test{kind}", ROWS[80:])
    folder = str(tmp_path)
    assert numbers(path=folder) == list(range(80))
    assert numbers(path=folder, split="test") == list(range(80, 100))
    assert numbers(path=folder, split="train[45:60]") == list(range(45, 60))
    assert numbers(path=folder, split="train[-10%:]+test[:2]") == [*range(72, 80), 80, 81]
    assert numbers(path=folder, limit=53) == list(range(53))
    assert numbers(path=folder, split="train[30:]", limit=25) == list(range(30, 55))
    assert numbers(path=str(tmp_path / f"test{kind}"), limit=3) == [80, 81, 82]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_keeps_the_line_numbers_of_the_file(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / f"train{kind}", ROWS)
    place = {
        row["prompt"]: place
        for place, row in all_rows(expand(Source(path=str(whole))).files, UNCHANGED, 2**20)
        if isinstance(row, dict)
    }
    sliced = expand(Source(path=str(tmp_path), split="train[60:63]")).files
    for at, row in all_rows(sliced, UNCHANGED, 2**20):
        assert isinstance(row, dict) and place[row["prompt"]] == at
    (file,) = sliced
    (chunk,) = plan_chunks(file)
    line, row = next(read_chunk(chunk, 2**20).rows)
    assert isinstance(row, dict)
    assert place[row["prompt"]] == f"{file.place}:{first_line(chunk) - 1 + line}"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_as_far_as_asked(tmp_path: Path, kind: str) -> None:
    (file,) = expand(Source(path=str(write(tmp_path / f"rows{kind}", ROWS)))).files
    assert count_rows(file, MOST_ROWS) == 100 and count_rows(file, 9) == 9


def test_arrow_in_its_file_format(tmp_path: Path) -> None:
    write(tmp_path / "x.feather", ROWS).rename(tmp_path / "x.arrow")
    assert numbers(path=str(tmp_path / "x.arrow")) == list(range(100))


def test_configs_in_the_readme(tmp_path: Path) -> None:
    for name, rows in (
        ("one/a.jsonl", ROWS[:5]),
        ("one/b.jsonl", ROWS[5:8]),
        ("two.jsonl", ROWS[8:]),
    ):
        write(tmp_path / name, rows)
    configs = (
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: one/a*\n"
        "  - split: heldout\n    path: one/b.jsonl\n- config_name: big\n  data_files: two.jsonl\n"
    )
    (tmp_path / "README.md").write_text(f"{configs}---\n# Rows\n")
    folder = str(tmp_path)
    assert numbers(path=folder, subset="small") == list(range(5))
    assert numbers(path=folder, subset="small", split="heldout") == [5, 6, 7]
    assert numbers(path=folder, subset="big") == list(range(8, 100))
    with pytest.raises(InputError, match=r"^subset: .* has several: small, big"):
        expand(Source(path=folder))
    with pytest.raises(InputError, match=r"no subset medium; its subsets: small, big"):
        expand(Source(path=folder, subset="medium"))
    (tmp_path / "README.md").write_text(f"{configs}  default: true\n---\n")
    assert numbers(path=folder) == list(range(8, 100))
    (tmp_path / "README.md").write_text(f"{configs}  sep: ';'\n---\n")
    with pytest.raises(InputError, match=r"README.md: subset big sets sep"):
        expand(Source(path=folder, subset="big"))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", "no split dev; its splits: train, test"),
        ("train[90:90]", "is empty; its splits: train, test"),
        ("test[200:]", "is empty; its splits: train, test"),
        ("train[:x]", "is not a split: Unrecognized instruction format"),
    ],
)
def test_a_split_that_is_not_there(tmp_path: Path, split: str, message: str) -> None:
    write(tmp_path / "train.jsonl", ROWS[:80])
    write(tmp_path / "test.jsonl", ROWS[80:])
    with pytest.raises(InputError, match=message):
        expand(Source(path=str(tmp_path), split=split))


def test_without_a_train_split_there_is_no_guess(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", ROWS)
    assert numbers(path=str(tmp_path)) == list(range(100))
    write(tmp_path / "validation.jsonl", ROWS)
    with pytest.raises(
        InputError, match="has no split train; name one of its splits: validation, test"
    ):
        expand(Source(path=str(tmp_path)))
    with pytest.raises(InputError, match=r"^split: .*test.jsonl is not a folder"):
        expand(Source(path=str(tmp_path / "test.jsonl"), split="test"))


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict(
        {"train": made.select(range(80)), "test": made.select(range(80, 100))}
    )
    both.save_to_disk(str(tmp_path / "both"), num_shards={"train": 3, "test": 1})
    assert numbers(path=str(tmp_path / "both")) == list(range(80))
    assert numbers(path=str(tmp_path / "both"), split="test[:2]") == [80, 81]
    made.filter(lambda row: row["prompt"].endswith("7")).save_to_disk(str(tmp_path / "one"))
    assert numbers(path=str(tmp_path / "one")) == list(range(7, 100, 10))
    next((tmp_path / "both" / "train").glob("*-00001-*")).unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00003.arrow is missing"):
        expand(Source(path=str(tmp_path / "both")))


def test_values_that_the_datasets_library_keeps_as_json(tmp_path: Path) -> None:
    import datasets

    tools = [{"name": "a", "parameters": {"x": 1}}, {"name": "b"}]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Json()}],
            "tools": datasets.List(datasets.Json()),
            "plain": datasets.Value("string"),
        }
    )
    row = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": tools,
        "plain": '{"not": "decoded"}',
    }
    made = datasets.Dataset.from_list([row], features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(tmp_path / "rows.parquet")
    assert rows_of(path=str(tmp_path / "saved")) == [row]
    assert rows_of(path=str(tmp_path / "rows.parquet")) == [row]


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf one \r\n\n  two\nthr\xff\n")
    first, second, third = rows_of(path=str(tmp_path / "x.txt"))
    assert (first, second) == ({"text": " one "}, {"text": "  two"})
    assert isinstance(third, BadRow) and "not UTF-8" in third.reason
    write(tmp_path / "rows.jsonl", ROWS[:2])  # beside rows, plain text is a licence or a note
    assert numbers(path=str(tmp_path)) == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [%s]}',
        '{"version": "1.1", "meta": {"data": [1]},\n "data":\n [%s], "end": 0}',
        '\ufeff {\n"data" : [\n%s\n]\n}\n',
    ],
)
def test_an_object_with_an_array_of_data(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text % ",\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert numbers(path=str(path)) == list(range(100))


def test_an_object_of_other_arrays_is_refused(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [{"text": "x"}]}, indent=1))
    recipe = make_recipe(train=[{"path": str(path)}])
    with pytest.raises(InputError, match=r"rows\.json:1: .*an object whose data is one"):
        resolve_data(recipe)


def test_lines_that_have_a_key_data_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    rows = [{"data": [{"a": 1}], "prompt": f"q{n}"} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(path=str(path)) == rows
    path.write_text(json.dumps({"data": ["a"], "prompt": "q0"}))
    assert numbers(path=str(path)) == [0]


def test_held_out_splits_of_the_sources_that_have_some(tmp_path: Path) -> None:
    for name in ("single.jsonl", "rows/train.jsonl", "rows/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    train = [{"path": "single.jsonl"}, {"path": "rows", "limit": 3}]
    data = DataSettings.model_validate({"train": train, "eval": {"split": "test"}})
    (held_out,) = resolve_sources(data, [tmp_path])["eval"]
    assert (held_out.path, held_out.split, held_out.limit) == (str(tmp_path / "rows"), "test", None)
    data = DataSettings.model_validate({"train": train[:1], "eval": {"split": "test"}})
    with pytest.raises(InputError, match=r"data\.eval\.0: .*single\.jsonl has no splits"):
        resolve_sources(data, [tmp_path])


def test_nested_nulls_of_columns_under_other_names(tmp_path: Path) -> None:
    """Arrow gives each object the keys of all: they are none of its own, whatever the columns and
    the keys of messages are called."""
    rows = [
        {
            "dialog": [{"who": "bot", "tool_calls": [{"name": n, "arguments": {key: 1}}]}],
            "known": [{"name": n, "parameters": {"properties": {key: {"type": "int"}}}}],
        }
        for n, key in (("f", "x"), ("g", "y"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = expand(Source(path=str(tmp_path / "a.parquet"))).files
    assert [row for _, row in all_rows(files, UNCHANGED, 10**6)] == rows


def test_dates_and_maps_in_calls(tmp_path: Path) -> None:
    """They are what JSON would have of them: a template or a reward writes them as JSON."""
    call = pa.struct([("when", pa.date32()), ("more", pa.map_(pa.string(), pa.string()))])
    message = pa.struct([("role", pa.string()), ("arguments", call)])
    value = {"role": "bot", "arguments": {"when": date(2020, 1, 2), "more": [("x", "1")]}}
    table = pa.table({"messages": pa.array([[value]], pa.list_(message))})
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = rows_of(path=str(tmp_path / "a.parquet"))
    assert row["messages"] == [
        {"role": "bot", "arguments": {"when": "2020-01-02", "more": {"x": "1"}}}
    ]
