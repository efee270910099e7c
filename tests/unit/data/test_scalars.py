"""Labels and numbers of CSV and of data frames."""

import csv
from pathlib import Path
from typing import Any

import pytest

from finray.training.config.source import Source
from finray.training.data.expand import expand
from finray.training.data.fields import number_of
from finray.training.data.formats import detect_format, normalise
from finray.training.data.resolve import all_rows
from finray.training.data.row_changes import UNCHANGED
from finray.training.data.scalars import label_of
from finray.training.data.shapes import LabelledExample, RowError


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "TRUE ", "1", "1.0", "yes", "Yes"])
def test_good(value: Any) -> None:
    assert label_of(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "False", "0", "0.0", "no", "NO"])
def test_bad(value: Any) -> None:
    assert label_of(value) is False


@pytest.mark.parametrize("value", [None, 2, -1, 0.5, float("nan"), "2", "", "good", [1], "10"])
def test_neither(value: Any) -> None:
    assert label_of(value) is None


def table(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    rows_read = all_rows(expand(Source(path=str(path))).files, UNCHANGED, 2**20)
    return [row for _, row in rows_read if isinstance(row, dict)]


def test_labels_and_margins_of_csv(tmp_path: Path) -> None:
    labels = ["True", "0", "yes", "1.0", "FALSE"]
    rows = table(
        tmp_path / "a.csv",
        [{"prompt": "2 + 2?", "completion": 4, "label": label, "score": "0.5"} for label in labels],
    )
    assert detect_format([("a:1", row) for row in rows], "kto") == "labelled"
    examples = [normalise(row, "labelled") for row in rows]
    assert [isinstance(one, LabelledExample) and one.label for one in examples] == [
        True, False, True, True, False,
    ]  # fmt: skip
    assert number_of(rows[0], "score") == 0.5
    with pytest.raises(RowError, match="score is 'high'"):
        number_of({"score": "high"}, "score")


@pytest.mark.parametrize(("answer", "text"), [(4, "4"), (4.0, "4"), (0.25, "0.25"), (-3, "-3")])
def test_numbers_as_answers(tmp_path: Path, answer: float, text: str) -> None:
    path = tmp_path / "a.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"instruction": "Add.", "output": answer}]), path)
    ((_, row),) = all_rows(expand(Source(path=str(path))).files, UNCHANGED, 2**20)
    assert row == {"instruction": "Add.", "output": text}
