"""Data files of any content: rows, bad rows or one message, never another error."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finray.training.common.errors import FinrayError
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.prepare import prepare
from finray.training.data.tasks import run_in_process
from finray.training.inspection import inspect_recipe

from .conftest import MakeRecipe

ONLINE = {"kind": "grpo", "rewards": [{"file": "/r.py:f", "source": ""}], "max_completion": 8}
METHODS: list[dict[str, Any]] = [
    {"kind": "sft"},
    {"kind": "pretrain"},
    {"kind": "dpo"},
    {"kind": "kto"},
    {"kind": "reward", "margin": "margin"},
    ONLINE,
]

words = st.text("ab \n\x00\x1b[31m\u2028é漢🙂<|im_end|>\ud800", max_size=12)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -0.0, True, None]))
values = st.recursive(
    st.one_of(words, numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "wizard", "\x1b[2J"])
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": roles, "content": st.one_of(words, values)}),
        st.fixed_dictionaries({"from": roles, "value": words}),
        values,
    ),
    max_size=4,
)
KEYS = ["messages", "conversations", "prompt", "completion", "response", "text", "content"]
KEYS += ["chosen", "rejected", "instruction", "input", "output", "history", "system", "label"]
KEYS += ["kto_tag", "margin", "reference", "prompts", "\x1b]0;title\x07"]
USER, ASSISTANT = ({"role": role, "content": "one two"} for role in ("user", "assistant"))
GOOD: list[dict[str, Any]] = [
    {"messages": [USER, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
    {"instruction": "one", "input": "", "output": "two", "history": [["three", "four"]]},
    {"prompt": "one ", "completion": "two", "label": True},
    {"prompt": "one", "chosen": "two", "rejected": "three", "margin": 1.5},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "three"}]},
    {"prompt": [USER], "reference": {"a": [1, None]}},
    {"text": "one two three " * 30},
]
changes = st.dictionaries(st.sampled_from(KEYS), st.one_of(words, messages, values), max_size=2)
rows = st.builds(lambda good, change: {**good, **change}, st.sampled_from(GOOD), changes)
contents = st.one_of(
    st.lists(rows, min_size=1, max_size=10),
    st.builds(
        lambda good, n, more: [good] * n + more,
        st.sampled_from(GOOD),
        st.integers(2, 9),
        st.lists(st.one_of(rows, values), max_size=3),
    ),
)


def as_lines(values: list[Any]) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values)


def as_csv(values: list[Any]) -> bytes:
    sink = io.StringIO(newline="")
    keys = list({key: 0 for value in values if isinstance(value, dict) for key in value}) or ["a"]
    out = csv.DictWriter(sink, keys, extrasaction="ignore")
    out.writeheader()
    out.writerows(value for value in values if isinstance(value, dict))
    return sink.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(values: list[Any]) -> bytes:
    """Arrow needs one type for a column, so values become text, or stay if they agree."""
    sink = io.BytesIO()
    try:
        table = pa.Table.from_pylist([value for value in values if isinstance(value, dict)])
        pq.write_table(table, sink)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        texts = [ascii(value) for value in values]
        pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue()


WRITERS = {
    "a.jsonl": as_lines,
    "a.json": lambda values: json.dumps(values).encode(),
    "a.jsonl.gz": lambda values: gzip.compress(as_lines(values)),
    "a.json.gz": lambda values: gzip.compress(json.dumps(values).encode()),
    "a.csv": as_csv,
    "a.parquet": as_parquet,
}


def try_all(recipe: Recipe, storage: Path) -> str:
    """Inspect and prepare, as a run does; returns the message, or nothing if there is data."""
    try:
        inspect_recipe(recipe)
        prepare(recipe, Folder(str(storage)), run_in_process)
    except FinrayError as error:
        message = str(error)
        assert message and not set(message) & {"\x1b", "\x07", "\x00", "\r"}
        return message
    return ""


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, int]]:
    counts = {"prepared": 0, "refused": 0}
    yield counts
    assert min(counts.values()) > 5, counts


@pytest.mark.long
@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_content_gives_data_or_one_message(
    data: st.DataObject,
    make_recipe: MakeRecipe,
    tmp_path_factory: pytest.TempPathFactory,
    seen: dict[str, int],
) -> None:
    """Rows of all shapes, in all kinds of files, cut short and with changed bytes."""
    name = data.draw(st.sampled_from([*WRITERS]))
    content = bytearray(WRITERS[name](data.draw(contents)))
    for _ in range(data.draw(st.sampled_from([0, 0, 1, 2]))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()) and data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    folder = tmp_path_factory.mktemp("files")
    (folder / name).write_bytes(content)
    method = data.draw(st.sampled_from(METHODS))
    recipe = make_recipe(
        train=folder / name,
        method=method,
        optim={"batch_size": 8 if method == ONLINE else 2, "micro_batch_size": 1},
        max_bad_rows=data.draw(st.sampled_from([0.0, 1.0])),
    )
    seen["refused" if try_all(recipe, folder / "prepared") else "prepared"] += 1


@pytest.mark.parametrize("name", [*WRITERS])
def test_no_content_at_all(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    for content in (b"", b"\x00", b"\xff\xfe{}", b"{" * 20_000, b"[" * 20_000, b"\x1f\x8b\x08"):
        (tmp_path / name).write_bytes(content)
        assert try_all(make_recipe(train=tmp_path / name), tmp_path / "prepared")


def test_names_and_keys_do_not_reach_the_terminal(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31mred.jsonl"
    for row in ({"\x1b[31mkey": 1}, {"messages": [{"role": "\x1b[2J", "content": "x"}]}, [1]):
        path.write_text(json.dumps(row))
        message = try_all(make_recipe(train=path), tmp_path / "prepared")
        assert "a[31mred.jsonl:1: " in message
