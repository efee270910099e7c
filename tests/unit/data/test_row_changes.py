"""What a source does with its rows: function, columns, keys, roles, system prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from finray.training.common.errors import InputError
from finray.training.config.source import RowFunction, Source
from finray.training.data.formats import detect_format, normalise
from finray.training.data.row_changes import RowChanges, change_rows
from finray.training.data.rows import BadRow, Row
from finray.training.data.shapes import Conversation, PreferencePair, Question


def changed(row: Row, **source: Any) -> Any:
    ((_, result),) = change_rows([(1, row)], RowChanges.of(Source(path="x", **source)))
    return result


def shape(row: Row, **source: Any) -> Any:
    result = changed(row, **source)
    return normalise(result, detect_format([("x:1", result)]))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


def test_columns() -> None:
    row = {"question": "2 + 2?", "answer": "4", "id": 7, "prompt": "old"}
    assert changed(row, columns={"prompt": "question", "completion": "answer"}) == {
        "id": 7,
        "prompt": "2 + 2?",
        "completion": "4",
    }
    assert changed({"a": 1, "b": 2}, columns={"a": "b", "b": "a"}) == {"a": 2, "b": 1}
    assert changed({"q": "x"}, columns={"prompt": "q", "system": "sys"}) == {"prompt": "x"}
    bad = changed(row, columns={"prompt": "problem"})
    assert isinstance(bad, BadRow)
    assert "no column problem" in bad.reason and "the row has question, answer, id" in bad.reason


def test_roles_and_keys_of_messages() -> None:
    row = {"dialog": [{"who": "customer", "text": "Hi"}, {"who": "agent", "text": "Hello"}]}
    assert shape(
        row,
        columns={"messages": "dialog"},
        message_keys={"role": "who", "content": "text"},
        roles={"customer": "user", "agent": "assistant"},
    ) == Conversation((user("Hi"), assistant("Hello")))


def test_keys_of_single_messages_and_of_text() -> None:
    asked, good = {"who": "user", "text": "Hi"}, {"who": "assistant", "text": "Hello"}
    keys = {"role": "who", "content": "text"}
    pair = {"prompt": [asked], "chosen": good, "rejected": {**good, "text": "What"}}
    result = shape(pair, message_keys=keys)
    assert isinstance(result, PreferencePair)
    assert result.chosen == Conversation((user("Hi"), assistant("Hello")), first_trained=1)
    counts = {"messages": [user("Hi"), {**assistant("Hello"), "counts": False, "why": "So."}] * 2}
    result = shape(counts, message_keys={"weight": "counts", "reasoning_content": "why"})
    assert isinstance(result, Conversation) and result.silent == {1, 3}
    assert result.messages[1]["reasoning_content"] == "So."
    row = {"messages": json.dumps([asked, good])}
    assert shape(row, message_keys=keys) == Conversation((user("Hi"), assistant("Hello")))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "prompter", "content": "Hi"}, assistant("Hello")]},
        {"messages": [user("Hi"), assistant("Hello")]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [user("Hi")], "completion": [assistant("Hello")]},
    ],
)
def test_system_prompt_of_every_conversation(row: Row) -> None:
    result = shape(row, system="Be brief.")
    assert result.messages == (SYSTEM, user("Hi"), assistant("Hello"))


def test_system_prompt_of_other_shapes() -> None:
    own = {"messages": [{"role": "system", "content": "Own."}, user("Hi"), assistant("Hello")]}
    assert shape(own, system="Be brief.") == shape(own)
    in_column = {"messages": [user("Hi"), assistant("Hello")], "system": "Own."}
    assert shape(in_column, system="Be brief.") == shape(own)
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "What"}
    result = shape(pair, system="Be brief.")
    assert isinstance(result, PreferencePair)
    assert result.chosen.messages == (SYSTEM, user("Hi"), assistant("Hello"))  # type: ignore[union-attr]
    whole = {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    result = shape(whole, system="Be brief.")
    assert result.rejected.messages == (SYSTEM, user("Hi"), assistant("B"))
    assert shape({"prompt": "Hi"}, system="Be brief.") == Question((SYSTEM, user("Hi")))
    bad = changed({"text": "plain"}, system="Be brief.")
    assert isinstance(bad, BadRow) and "needs a conversation" in bad.reason


CODE = """
def to_messages(row):
    if row["q"] == "skip":
        return None
    row["q"].strip()
    return {"messages": [{"role": "user", "content": row["q"]},
                         {"role": "assistant", "content": str(row["a"])}]}

def wrong(row):
    return [row]

def two(row, other):
    return row

def changes(row):
    row["messages"].append(1)
    return row

def tuples(row):
    return {"messages": ({"role": "user", "content": row["q"]},), "tools": ()}

def leaves(row):
    raise SystemExit("out")
"""


def function(tmp_path: Path, name: str) -> RowFunction:
    path = tmp_path / "rows.py"
    path.write_text(CODE)
    return RowFunction(file=f"rows.py:{name}").resolve(tmp_path, "data.train.0.map")


def test_a_row_function(tmp_path: Path) -> None:
    to_messages = function(tmp_path, "to_messages")
    row = {"q": "2 + 2?", "a": 4}
    assert changed(row, map=to_messages) == {"messages": [user("2 + 2?"), assistant("4")]}
    assert changed({"q": "skip"}, map=to_messages) is None
    bad = changed({"q": None}, map=to_messages)
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("map to_messages raises AttributeError") and "line 5" in bad.reason
    assert bad.raw == '{"q": null}'
    assert "returns list; expected a dict" in changed(row, map=function(tmp_path, "wrong")).reason
    assert "the function called sys.exit" in changed(row, map=function(tmp_path, "leaves")).reason
    with pytest.raises(
        InputError, match=r"^data.train.0.map.file: .*rows.py:12: two must take one"
    ):
        function(tmp_path, "two")


def test_a_row_function_keeps_the_row_of_the_file(tmp_path: Path) -> None:
    row: Row = {"messages": []}
    assert changed(row, map=function(tmp_path, "changes")) == {"messages": [1]}
    assert row == {"messages": []}


def test_tuples_of_a_function_are_lists(tmp_path: Path) -> None:
    result = changed({"q": "Hi"}, map=function(tmp_path, "tuples"))
    assert result == {"messages": [user("Hi")], "tools": []}
