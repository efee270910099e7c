"""Finding a source's files, and splitting them."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.training.common.errors import InputError
from finray.training.config.source import Source
from finray.training.data import splits
from finray.training.data.expand import expand
from finray.training.data.sources import CHUNK_BYTES, SourceFile, file_kind, plan_chunks


def names(path: Path | str) -> list[str]:
    return [file.name for file in expand(Source(path=str(path))).files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.csv", "deep/er/c.json", "deep/d.jsonl.gz", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in (".hidden.jsonl", "_SUCCESS.json", ".cache/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_file_folder_and_globs(folder: Path) -> None:
    assert names(folder / "b.jsonl") == ["b.jsonl"]
    assert names(folder) == ["a.csv", "b.jsonl", "deep/d.jsonl.gz", "deep/er/c.json"]
    assert names(f"{folder}/") == names(folder)
    assert names(folder / "*.jsonl") == ["b.jsonl"]
    assert names(folder / "*") == ["a.csv", "b.jsonl"]
    assert names(folder / "**" / "*.json*") == ["b.jsonl", "deep/d.jsonl.gz", "deep/er/c.json"]
    assert names(folder / "d*p" / "[a-d].jsonl.gz") == ["deep/d.jsonl.gz"]


def test_a_name_with_brackets_is_a_file_where_it_exists(folder: Path) -> None:
    (folder / "x[1].jsonl").write_text("{}")
    assert names(folder / "x[1].jsonl") == ["x[1].jsonl"]
    (folder / "y[1]").mkdir()
    (folder / "y[1]" / "a.jsonl").write_text("{}")
    assert names(folder / "y[1]" / "*.jsonl") == ["a.jsonl"]
    with pytest.raises(InputError, match=r"no such file|matches no data file"):
        names(folder / "y[1]" / "b.jsonl")


def test_uri_of_a_local_file(folder: Path) -> None:
    assert names(f"file://{folder}/b.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "no such file or folder"),
        ("*.parquet", "matches no data file"),
        ("README.md", "unknown kind of file"),
        ("empty", "contains no data files"),
    ],
)
def test_missing_files_are_errors(folder: Path, path: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        names(folder / path)
    assert str(folder / path) in str(caught.value)
    assert ".jsonl" in str(caught.value)


@pytest.mark.parametrize("path", ["", "*.jsonl", "deep/*.gz"])
def test_a_link_to_nothing_is_an_error_where_it_is_read(folder: Path, path: str) -> None:
    (folder / "c.jsonl").symlink_to(folder / "gone.jsonl")
    (folder / "e.jsonl").symlink_to(folder / "b.jsonl")
    if path.endswith("gz"):
        assert names(folder / path) == ["d.jsonl.gz"]
        return
    with pytest.raises(InputError, match=r"/c\.jsonl: a link to a file that does not exist"):
        names(folder / path)


def test_an_empty_file_is_an_error(folder: Path) -> None:
    (folder / "deep" / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"deep/empty\.jsonl: the file is empty"):
        names(folder)


def test_a_folder_or_file_that_cannot_be_read_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(splits, "data_files", refuse)
    with pytest.raises(InputError, match=f"^{folder}: cannot read it: .*ermission denied"):
        names(folder)
    monkeypatch.setattr(SourceFile, "open", refuse)
    with pytest.raises(InputError, match=r"b\.jsonl: cannot read it: .*ermission denied"):
        expand(Source(path=str(folder / "b.jsonl"), limit=3))


def test_an_unknown_store_is_an_error() -> None:
    with pytest.raises(InputError, match="nostore"):
        names("nostore://bucket/a.jsonl")


@pytest.mark.parametrize(("text", "kind"), [(' \n\n[{"a": 1}]', "array"), ('\n{"a": 1}', "lines")])
def test_the_kind_of_a_json_file_depends_on_its_content(
    tmp_path: Path, text: str, kind: str
) -> None:
    plain, packed = tmp_path / "a.json", tmp_path / "b.json.gz"
    plain.write_text(text, encoding="utf-8-sig")
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        assert file_kind(expand(Source(path=str(path))).files[0]) == kind


def test_chunks_cover_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * (2 * CHUNK_BYTES + 5))
    ranges = [(c.start, c.stop) for c in plan_chunks(expand(Source(path=str(path))).files[0])]
    last = 2 * CHUNK_BYTES
    assert ranges == [(0, CHUNK_BYTES), (CHUNK_BYTES, last), (last, last + 5)]


def test_parquet_chunks_are_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"n": pa.array(range(2_000_000), pa.int64())})
    pq.write_table(table, path, row_group_size=300_000)
    chunks = plan_chunks(expand(Source(path=str(path))).files[0])
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])]
    assert chunks[-1].stop == 7
    assert len(chunks) > 1


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"a\.parquet: not a Parquet file"):
        plan_chunks(expand(Source(path=str(path))).files[0])
