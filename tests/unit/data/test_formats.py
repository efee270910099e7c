"""Row formats: detection, normalisation, and refused rows."""

from typing import Any

import pytest

from finray.training.common.errors import InputError
from finray.training.config.source import KnownFormat
from finray.training.data.formats import detect_format, normalise
from finray.training.data.shapes import Completion, Conversation, RowError, Text, share_of

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

ROWS: list[tuple[KnownFormat, dict[str, Any], Any]] = [
    ("messages", {"messages": [SYSTEM, USER, ASSISTANT], "id": 1}, (SYSTEM, USER, ASSISTANT)),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
        },
        (SYSTEM, USER, ASSISTANT),
    ),
    ("sharegpt", {"conversations": [USER, ASSISTANT], "system": ""}, (USER, ASSISTANT)),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "o"},
                {"from": "gpt", "value": "a"},
            ]
        },
        (
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "o"},
            ASSISTANT,
        ),
    ),
    ("alpaca", {"instruction": "q", "output": "a", "text": "ignored"}, (USER, ASSISTANT)),
    (
        "alpaca",
        {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": None},
        (SYSTEM, {"role": "user", "content": "q\n\nmore"}, ASSISTANT),
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "history": [["q", "a"]]},
        (USER, ASSISTANT, USER, ASSISTANT),
    ),
]


@pytest.mark.parametrize(("row_format", "row", "messages"), ROWS)
def test_conversations(row_format: KnownFormat, row: dict[str, Any], messages: Any) -> None:
    assert detect_format([("f:1", row)], "sft") == row_format
    assert normalise(row, row_format) == Conversation(messages)


@pytest.mark.parametrize("key", ["completion", "response"])
def test_prompt_completion(key: str) -> None:
    row = {"prompt": "q", key: "a"}
    assert detect_format([("f:1", row)], "sft") == "prompt_completion"
    assert normalise(row, "prompt_completion") == Completion("q", "a")
    expected = Conversation((USER, ASSISTANT, USER, ASSISTANT), first_trained=3)
    for answer in ([ASSISTANT], ASSISTANT, "a"):
        turns = {"prompt": [USER, ASSISTANT, USER], key: answer}
        assert normalise(turns, "prompt_completion") == expected


@pytest.mark.parametrize("key", ["text", "content"])
def test_text(key: str) -> None:
    row = {key: " t\n", "url": None}
    assert detect_format([("f:1", row)], "sft") == "text"
    assert normalise(row, "text") == Text(" t\n")


def test_detection_goes_by_most_rows() -> None:
    rows = [("f:1", {"text": "x"}), *[("f:2", {"messages": [], "text": ""})] * 3]
    assert detect_format(rows, "sft") == "messages"


CHAT_ROW = {"messages": [USER, ASSISTANT]}
ANSWER_ROW = {"prompt": "q", "completion": "a"}
PAIR_ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("method", "row", "row_format"),
    [
        ("sft", {**CHAT_ROW, "label": "billing"}, "messages"),
        ("sft", {**CHAT_ROW, "label": 3}, "messages"),
        ("sft", {**ANSWER_ROW, "kto_tag": None, "label": 0.5}, "prompt_completion"),
        ("sft", {**ANSWER_ROW, **PAIR_ROW}, "prompt_completion"),
        ("sft", {**ANSWER_ROW, "messages": None}, "prompt_completion"),
        ("sft", {**ANSWER_ROW, "label": True}, "labelled"),  # a bad answer is not imitated
        ("pretrain", {"text": "t", "label": 1}, "text"),
        ("kto", {**ANSWER_ROW, **PAIR_ROW, "label": None}, "preference"),
        ("kto", {**ANSWER_ROW, "label": "yes"}, "labelled"),
        ("dpo", {**PAIR_ROW, "messages": 5, "label": "x", "text": 1}, "preference"),
        ("grpo", {**ANSWER_ROW, "label": True}, "prompt_completion"),
        ("grpo", PAIR_ROW, "prompt"),
    ],
)
def test_columns_that_a_method_has_no_use_for_do_not_decide(
    method: str, row: dict[str, Any], row_format: KnownFormat
) -> None:
    assert detect_format([("f:1", row)], method) == row_format


def test_messages_of_parquet_have_all_keys() -> None:
    """Arrow gives every message of a column the same keys, with null where one had none."""
    nothing = {"from": None, "value": None}
    row = {"messages": [{**USER, **nothing}, {**ASSISTANT, **nothing}]}
    assert normalise(row, "messages") == Conversation((USER, ASSISTANT))


def test_the_error_for_an_unknown_format_names_its_keys_and_all_formats() -> None:
    with pytest.raises(InputError) as caught:
        detect_format([("f.jsonl:7", {"question": 1, "answer": 2})], "sft")
    message = str(caught.value)
    assert message.startswith("f.jsonl:7: ")
    assert "question, answer" in message
    for name in ("messages", "sharegpt", "alpaca", "prompt_completion", "text"):
        assert f"{name}: " in message


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("messages", {}, "messages is null; expected a list"),
        ("messages", {"messages": None}, "messages is null"),
        ("messages", {"messages": "hi"}, "messages is 'hi'; expected a list of messages, or JSON"),
        ("messages", {"messages": []}, "empty list"),
        ("messages", {"messages": ["hi"]}, r"messages\[0\] is of type str"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": [{"role": "wizard", "content": "x"}]}, "'wizard'; expected sys"),
        ("messages", {"messages": [{"role": None, "content": "x"}]}, r"\[0\]\.role is None"),
        ("messages", {"messages": [{"role": "user"}]}, r"\[0\]\.content is missing"),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": None}]}, "content is null"),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "content is empty"),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "content": [5]}]},
            r"content\[0\] is of type",
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": 3}]}, "of type int"),
        ("alpaca", {"instruction": "q", "output": None}, "output is null"),
        ("alpaca", {"output": "a"}, "instruction is missing"),
        ("alpaca", {"instruction": "q", "output": "a", "input": 5}, "input is of type int"),
        ("alpaca", {"instruction": "q", "output": "a", "history": ["x"]}, r"history\[0\]"),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history is str"),
        ("prompt_completion", {"prompt": "q"}, "completion or response is missing"),
        ("prompt_completion", {"prompt": "q", "completion": ""}, "completion is empty"),
        (
            "prompt_completion",
            {"prompt": [ASSISTANT], "completion": [USER]},
            "completion does not begin with an assistant turn",
        ),
        ("text", {"text": 1.5}, "of type float"),
        ("text", {"text": "half \ud83d pair"}, "surrogate"),
        ("text", {"body": "x"}, "text or content is missing"),
    ],
)
def test_refused(row_format: KnownFormat, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        normalise(row, row_format)


def test_shares_depend_on_content_and_purpose_alone() -> None:
    draws = [share_of(Text(str(n)), "holdout") for n in range(2000)]
    assert draws == [share_of(Text(str(n)), "holdout") for n in range(2000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draw < 0.1 for draw in draws) / 2000 - 0.1) < 0.03
    assert share_of(Text("x"), "holdout") != share_of(Text("x"), "weight")
    assert share_of(Completion("ab", "c"), "weight") != share_of(Completion("a", "bc"), "weight")
