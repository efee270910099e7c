"""What is estimated of large data from its first rows, against its preparation."""

import json
from pathlib import Path
from typing import Any

import pytest

from finray.cluster.api import outlook
from finray.training.config.recipe import recipe_from_dict
from finray.training.data.sample import ROWS

WORD = "after "


def chat(number: int) -> dict[str, Any]:
    """A chat; every third is longer than 128 tokens."""
    answer = WORD * (199 if number % 3 == 0 else 2)
    ask, reply = ("user", f"{number}?"), ("assistant", answer)
    return {"messages": [{"role": role, "content": text} for role, text in (ask, reply)]}


def pair(number: int) -> dict[str, Any]:
    ask, answer = chat(number)["messages"]
    return {"prompt": [ask], "chosen": [answer], "rejected": [{**answer, "content": "no"}]}


def text(number: int) -> dict[str, Any]:
    return {"text": "One comes before two. " * (40 + number % 7)}


@pytest.mark.parametrize(
    ("kind", "row", "overlong"),
    [
        ("dpo", pair, "drop"),
        ("sft", chat, "drop"),
        ("sft", chat, "truncate"),
        ("pretrain", text, "drop"),
    ],
)
def test_rows_that_are_left_out_do_not_count(
    kind: str,
    row: Any,
    overlong: str,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows are in the sample: tokens are exact, and sequences but for their packing."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row(number)) for number in range(ROWS)), encoding="utf-8")
    settings = {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 4},
        "method": {"kind": kind},
        "data": {"train": [{"path": str(file)}], "max_length": 128, "overlong": overlong},
        "optim": {"batch_size": 4},
        "storage": str(tmp_path / "storage"),
    }
    recipe = recipe_from_dict(settings)
    with monkeypatch.context() as large:
        large.setattr(outlook, "_TRIED_BYTES", 0)
        estimated = outlook.data_outlook(recipe)
    exact = outlook.data_outlook(recipe)
    assert (estimated["is_exact"], exact["is_exact"]) == (False, True)
    assert estimated["tokens"] == exact["tokens"]
    if kind == "dpo":
        assert estimated["sequences"] == exact["sequences"] == 133
    assert estimated["sequences"] == pytest.approx(exact["sequences"], rel=0.2)
    assert (kind == "pretrain") == (exact["sequences"] > ROWS)


def test_where_no_first_row_fits_nothing_is_estimated(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(chat(0)) for _ in range(9)), encoding="utf-8")
    monkeypatch.setattr(outlook, "_TRIED_BYTES", 0)
    settings = {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": str(file)}], "max_length": 128},
        "optim": {"batch_size": 4},
        "storage": str(tmp_path / "storage"),
    }
    estimated = outlook.data_outlook(recipe_from_dict(settings))
    assert (estimated["tokens"], estimated["sequences"], estimated["overlong"]) == (None, None, 9)
