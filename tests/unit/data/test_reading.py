"""Rows, line numbers and errors of every kind of file."""

import csv
import gc
import gzip
import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.common.errors import InputError
from finray.training.config.source import Source
from finray.training.data import reading
from finray.training.data.expand import expand
from finray.training.data.formats import normalise
from finray.training.data.reading import first_line, read_chunk
from finray.training.data.rows import BadRow, Unreadable
from finray.training.data.shapes import RowError, Text
from finray.training.data.sources import Chunk, SourceFile, plan_chunks

Numbered = list[tuple[int, Any]]


LIMIT = 16 * 2**20


def read(path: Path, size: int | None = None, max_bytes: int = LIMIT) -> Numbered:
    """(line in the file, row) of every row, from chunks of `size` bytes."""
    file = expand(Source(path=str(path))).files[0]
    chunks = plan_chunks(file)
    if size is not None:
        starts = range(0, file.size, size)
        chunks = [Chunk(file, "lines", s, min(s + size, file.size)) for s in starts]
    numbered: Numbered = []
    before = 0
    for chunk in chunks:
        content = read_chunk(chunk, max_bytes)
        numbered += [(before + line, row) for line, row in content.rows]
        assert first_line(chunk) == before + 1 or content.lines == 0
        before += content.lines
    return numbered


def reasons(rows: Numbered) -> list[tuple[int, str]]:
    return [(line, row.reason) for line, row in rows if isinstance(row, BadRow)]


lines = st.lists(
    st.one_of(
        st.just(""),
        st.just("  \r"),
        st.text("äβ x", max_size=40).map(lambda text: json.dumps({"t": text}, ensure_ascii=False)),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(lines=lines, size=st.integers(1, 60), ends=st.booleans())
def test_chunks_of_any_size_hold_the_rows_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "a.jsonl"
    path.write_bytes("\n".join(["", *lines]).encode() + (b"\n" if ends else b" "))
    expected = [
        (number, json.loads(line)) for number, line in enumerate(lines, start=2) if line.strip()
    ]
    assert read(path, size) == expected
    assert read(path) == expected


def test_a_file_is_closed_when_its_rows_are_not_all_taken(tmp_path: Path) -> None:
    """At once, not when garbage is collected, which another thread may do."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 3, encoding="utf-8")
    (file,) = expand(Source(path=str(path))).files
    (chunk,) = plan_chunks(file)
    gc.collect()
    gc.disable()
    try:
        content = read_chunk(chunk, 2**20)
        assert next(content.rows) == (1, {"a": 1})
        rows = weakref.ref(content.rows)
        del content
        assert rows() is None
    finally:
        gc.enable()


def test_bad_lines_do_not_stop_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep = b"[" * 200_000
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n{"a": \xff}\n\n{"a": 2\n[1]\n' + deep + b'\nnull\n{"a": 3}'
    )
    rows = read(path)
    assert [(line, row) for line, row in rows if isinstance(row, dict)] == [
        (1, {"a": 1}),
        (8, {"a": 3}),
    ]
    bad = reasons(rows)
    assert [line for line, _ in bad] == [2, 4, 5, 6, 7]
    expected = ("not UTF-8 text at byte 7", "not valid JSON", "found list", "nested", "NoneType")
    for (_, reason), words in zip(bad, expected, strict=True):
        assert words in reason
    assert all(len(row.raw) < 400 for _, row in rows if isinstance(row, BadRow))


def test_compressed_lines(tmp_path: Path) -> None:
    text = b'{"a": 1}\n\nbad\n{"a": 2}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(text)
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        rows = read(tmp_path / name)
        assert [line for line, _ in rows] == [1, 3, 4]
        assert rows[2][1] == {"a": 2}


def test_a_truncated_compressed_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000)[:-40])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: the file is damaged"):
        read(path)


def test_array_elements_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[\n  {"a": 1},\n  {\n "a":\n 2}\n, 3, {"a": "x\\ny"},\n{"a": 4}]\n')
    rows = read(path)
    assert [line for line, _ in rows] == [3, 4, 7, 7, 8]
    assert reasons(rows) == [(7, "expected a JSON object, found int")]
    assert rows[-1][1] == {"a": 4}


def test_array_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    elements = [{"n": n, "text": "ä\n" * n} for n in range(0, 2000, 2)]
    path.write_text(json.dumps(elements, indent=1, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 2 * 2**20
    rows = read(path)
    assert [row for _, row in rows] == elements
    assert [line for line, _ in rows] == [2 + 4 * n for n in range(len(elements))]


def test_bad_utf8_in_an_array_affects_its_element_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "x"},\n{"a": "\xff"},\n{"a": "z"}]')
    rows = read(path)
    assert reasons(rows) == [(2, "not UTF-8 text")]
    assert [row for _, row in rows][2] == {"a": "z"}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3, "expected ','"),
        ('[{"a": 1},\n{"a": 2},\n', 3, "Expecting value"),
        ('[{"a": 1}\n', 2, "the file ends"),
        ('[{"a": 1},\n]', 2, "there is nothing between ',' and ']'"),
        ('[{"a": 1}]\n[{"a": 2}]', 2, "the array ends, and the file goes on"),
        ('{"data": [{"a": 1}],\n"b": 2}\nx', 3, "the array ends, and the file goes on"),
        ('{"data": [{"a": 1}]\n', 2, "the file ends"),
        ('{"data": [{"a": 1}],\n"data": []}', 2, "the key 'data' comes twice"),
        ('[\n\n{"a": x}]', 3, "Expecting value"),
    ],
)
def test_a_broken_array_is_an_error(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"a\.json:{line}: .*{message}"):
        read(path)


def test_empty_array_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[ \n]")
    assert read(tmp_path / "a.json") == []


ROW = '{"text": "one"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ROW.encode("utf-16"), "the text is not UTF-8, but UTF-16; convert"),
        ("a.json", ROW.encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        ("a.jsonl.gz", gzip.compress(ROW.encode("utf-16-le")), "iconv -f UTF-16LE"),
        ("a.txt", "one\n".encode("utf-32"), "iconv -f UTF-32 -t"),
        ("a.txt", "one\n".encode("utf-32-be"), "iconv -f UTF-32BE -t"),
        ("a.csv", "text\none\n".encode("utf-16"), "the text is not UTF-8"),
        (
            "a.jsonl",
            gzip.compress(ROW.encode()),
            r"holds data compressed by gzip \(\.gz\), not the",
        ),
        ("a.csv", b"PK\x03\x04\x00", "holds a zip archive or a workbook"),
        ("b.csv", b"text,n,text\na,1,b\n", r"b\.csv:1: the header has two columns 'text'"),
        ("b.csv", b"id;text\n1;one\n", r"b\.csv:1: .* 'id;text'; columns are separated by commas"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_word_may_begin_as_files_of_other_kinds_do(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ARROW,PAR1\n1,2\n", encoding="utf-8")
    assert [row for _, row in read(tmp_path / "a.csv")] == [{"ARROW": "1", "PAR1": "2"}]


def test_csv_rows_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_bytes(
        b'\xef\xbb\xbfprompt,completion\n"a\nb",c\n\nonly\n"\xff",d\n' + f"e,{long}".encode()
    )
    rows = read(path)
    assert [line for line, _ in rows] == [2, 5, 6, 7]
    assert rows[0][1] == {"prompt": "a\nb", "completion": "c"}
    assert rows[3][1] == {"prompt": "e", "completion": long}
    expected = [(5, "1 cells, but the header has 2"), (6, "not UTF-8 text")]
    assert reasons(rows) == expected


def test_tsv_and_broken_csv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tn\nhello, you\t1\n")
    assert read(tmp_path / "a.tsv") == [(2, {"text": "hello, you", "n": "1"})]
    (tmp_path / "b.csv").write_text('text\nfine\n"unclosed\nmore')
    with pytest.raises(InputError, match=r"b\.csv:3: not valid CSV"):
        read(tmp_path / "b.csv")


def test_parquet_rows_count_from_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(n) for n in range(10)]}), path, row_group_size=3)
    file = expand(Source(path=str(path))).files[0]
    chunk = Chunk(file, "parquet", 1, 3)
    content = read_chunk(chunk, LIMIT)
    assert (first_line(chunk), content.lines) == (4, 6)
    assert next(content.rows) == (1, {"text": "3"})
    assert read(path)[9] == (10, {"text": "9"})


TEXT = json.dumps({"text": 'ä "[{,' * 200})
LARGE = json.dumps({"text": 'ä \\ "]},' * 400_000}, ensure_ascii=False)


def write_rows(folder: Path, kind: str, texts: list[str]) -> Path:
    """A file of a kind with these rows, which are objects with a text."""
    values = [json.loads(text) for text in texts]
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(values), path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["text"], *([value["text"]] for value in values)])
    elif kind == "json":
        path.write_text("[\n" + ",\n".join(texts) + "\n]", encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    else:
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_a_row_that_is_too_large_is_bad_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    path = write_rows(tmp_path, kind, [TEXT, LARGE, TEXT, LARGE, TEXT])
    size = len(json.loads(LARGE)["text"].encode())
    rows = read(path, max_bytes=size // 2)
    first = {"json": 2, "csv": 2}.get(kind, 1)
    assert [line for line, _ in rows] == [first + n for n in range(5)]
    assert [row for _, row in rows][::2] == [json.loads(TEXT)] * 3
    for _, reason in reasons(rows):
        assert reason.endswith(f" bytes; data.max_row_bytes allows {size // 2:,}")
    assert len(reasons(rows)) == 2
    assert [row for _, row in read(path, max_bytes=2 * size)][1] == json.loads(LARGE)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_line_without_an_end_is_not_held_in_memory(tmp_path: Path, kind: str) -> None:
    path = write_rows(tmp_path, kind, ['{"text": "' + "x" * 60_000_000 + '"}', TEXT])
    tracemalloc.start()
    rows = read(path, max_bytes=2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [line for line, _ in rows] == [1, 2]
    assert reasons(rows)[0][1].startswith("the row has 60,000,012 bytes; ")
    assert peak < 10 * 2**20


def test_elements_that_cannot_be_decoded(tmp_path: Path) -> None:
    """A huge one and a deep one are bad rows; a huge one without an end is an error."""
    path = tmp_path / "a.json"
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    long = '{"a": ' + "9" * 5000 + "}"
    path.write_text(
        f'[{{"n": 1}},\n{deep},\n{"1" * 5_000_000},\n{{"n": 4}},\n{long}]', encoding="utf-8"
    )
    rows = read(path, max_bytes=2**20)
    assert [row for _, row in rows if isinstance(row, dict)] == [{"n": 1}, {"n": 4}]
    assert reasons(rows) == [
        (2, "not usable JSON: nested too deeply"),
        (3, "the row has 5,000,000 bytes; data.max_row_bytes allows 1,048,576"),
        (5, "not usable JSON: an integer has thousands of digits"),
    ]
    (tmp_path / "a.jsonl").write_text(long, encoding="utf-8")
    assert reasons(read(tmp_path / "a.jsonl")) == [(1, reasons(rows)[-1][1])]
    path.write_text('[{"n": 1},\n{"text": "' + "x" * 5_000_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json:2: the JSON array is invalid from here on"):
        read(path, max_bytes=2**20)


def test_a_value_that_python_cannot_hold_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([0, 2**60, 1], pa.timestamp("ms"))
    texts = pa.array([b"a", b"b", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": texts, "at": times}), path)
    rows = [row for _, row in read(path)]
    assert [row["text"] for row in rows[:2]] == ["a", "b"]
    assert isinstance(rows[1]["at"], Unreadable)
    assert isinstance(rows[2]["text"], Unreadable)
    assert normalise(rows[1], "text") == Text("b")
    with pytest.raises(RowError, match="text cannot be read: 'utf-8' codec"):
        normalise(rows[2], "text")


def test_the_place_of_a_row_whose_file_is_cut_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' * 9, encoding="utf-8")
    chunk = Chunk(expand(Source(path=str(path))).files[0], "lines", 50, 81)
    assert first_line(chunk) == 7
    path.write_text('{"n": 1}\n' * 2, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl: changed while it was read"):
        first_line(chunk)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.jsonl: the file is damaged or cannot be read"):
        first_line(chunk)


def test_a_file_whose_state_cannot_be_read_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not one of the storage for prepared data."""

    def lost(file: SourceFile) -> bool:
        raise OSError("connection lost")

    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n', encoding="utf-8")
    file = SourceFile(str(tmp_path), path.name, path.stat().st_size, path.stat().st_mtime_ns)
    (chunk,) = plan_chunks(file)
    monkeypatch.setattr(reading, "is_unchanged", lost)
    with pytest.raises(InputError, match=r"a\.jsonl: .* cannot be read: connection lost"):
        list(read_chunk(chunk, LIMIT).rows)
