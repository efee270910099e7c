"""Rows, line numbers and errors of every kind of file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.common.errors import InputError
from finray.training.config.sections import Source
from finray.training.data.reading import BadRow, first_line, read_chunk
from finray.training.data.sources import Chunk, expand, plan_chunks

Numbered = list[tuple[int, Any]]


def read(path: Path, size: int | None = None) -> Numbered:
    """(line in the file, row) of every row, from chunks of `size` bytes."""
    file = expand(Source(path=str(path)))[0]
    chunks = plan_chunks(file)
    if size is not None:
        starts = range(0, file.size, size)
        chunks = [Chunk(file, "lines", s, min(s + size, file.size)) for s in starts]
    numbered: Numbered = []
    before = 0
    for chunk in chunks:
        content = read_chunk(chunk)
        assert first_line(chunk) == before + 1 or content.lines == 0
        numbered += [(before + line, row) for line, row in content.rows]
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
    file = expand(Source(path=str(path)))[0]
    chunk = Chunk(file, "parquet", 1, 3)
    content = read_chunk(chunk)
    assert (first_line(chunk), content.lines) == (4, 6)
    assert next(content.rows) == (1, {"text": "3"})
    assert read(path)[9] == (10, {"text": "9"})
