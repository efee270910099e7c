"""Messages as people write them, and the rows that are refused, with their places."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chat_templates import (
    CONVERSATIONS,
    SUNNY,
    TOOLS,
    answer,
    call,
    renderer_with,
    template,
    tokenizer_with,
    user,
)

from finray.training.config.source import KnownFormat
from finray.training.data.formats import detect_format, normalise, read_examples
from finray.training.data.messages import turns_of, with_roles
from finray.training.data.reading import read_chunk
from finray.training.data.row_facts import unused_fields
from finray.training.data.shapes import (
    Conversation,
    LabelledExample,
    PreferencePair,
    Question,
    RowError,
    parts_of,
)
from finray.training.data.sources import SourceFile, plan_chunks

ASKED = user("Q1")
CALLS = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
CALLING = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULT = {"role": "tool", "content": "sunny"}
TEXT = json.dumps({"name": "get_weather", "arguments": {"city": "Paris"}})


@pytest.mark.parametrize(
    "written",
    [
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "assistant", "tool_calls": CALLS},
        {"role": "assistant", "content": [], "tool_calls": json.dumps(CALLS)},
        {"role": "assistant", "tool_calls": [CALLS[0]["function"]]},
        {"role": "assistant", "tool_calls": [json.dumps(CALLS[0])]},
        {
            "role": "assistant",
            "tool_calls": [
                {"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}, "id": None}
            ],
        },
        {"role": "assistant", "function_call": CALLS[0]["function"]},
        {"role": "assistant", "function_call": TEXT},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "args": {"city": "Paris"}}]},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "input": {"city": "Paris"}}]},
        {
            "role": "assistant",
            "tool_calls": [{**CALLS[0], "id": ""}],
            "function_call": {"name": None, "arguments": None},
        },
        {"from": "function_call", "value": TEXT},
        {"role": "tool_call", "content": f"[{TEXT}]"},
    ],
)
def test_a_call_in_each_notation(written: dict[str, Any]) -> None:
    assert turns_of([ASKED, written], "messages") == [ASKED, CALLING]


@pytest.mark.parametrize(
    "written",
    [
        {"role": "assistant", "content": "A1", "reasoning_content": "R1"},
        {"role": "assistant", "content": "A1", "thinking": "R1"},
        {"role": "assistant", "content": "A1", "reasoning": "R1"},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "text": "R1"}, {"type": "text", "text": "A1"}],
        },
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "R1"}, {"type": "text", "value": "A1"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "R1"}]},
                {"type": "text", "text": "A1"},
            ],
        },
        {"role": "assistant", "content": "A1", "reasoning_content": "\n", "reasoning": "R1"},
        {"role": "assistant", "content": "A1", "thinking": [{"type": "text", "text": "R1"}]},
    ],
)
def test_reasoning_in_each_notation(written: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "A1", "reasoning_content": "R1"}
    assert turns_of([ASKED, written], "messages") == [ASKED, message]


def test_a_blank_thought_is_none() -> None:
    written = {"role": "assistant", "content": "A1", "reasoning_content": "\n\n"}
    assert turns_of([ASKED, written], "messages") == [ASKED, answer("A1")]


def test_a_call_whose_arguments_have_another_name_is_refused() -> None:
    written = {"role": "assistant", "tool_calls": [{"name": "f", "values": {"x": 1}}]}
    with pytest.raises(RowError, match=r"tool_calls\[0\] has no arguments, but values;"):
        turns_of([ASKED, written], "messages")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (21, "21"),
        (True, "true"),
        ([{"title": "T", "content": "C"}], '[{"title": "T", "content": "C"}]'),
        ([1, 2], "[1, 2]"),
        ([{"type": "text", "text": "sun"}, {"text": "ny"}], "sunny"),
        (["sun", "ny"], "sunny"),
    ],
)
def test_what_a_tool_returns(content: Any, text: str) -> None:
    """Data becomes JSON, so that no key of it is lost."""
    result = {"role": "tool", "content": content, "tool_call_id": 7}
    read = turns_of([ASKED, result], "messages")[-1]
    assert read == {"role": "tool", "content": text, "tool_call_id": "7"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": [1]}]}, answer("A1")]},
            r"content\[0\]\.type is \[1\]; expected text",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
            "type 'tool_use'; write it as an entry of the message's tool_calls",
        ),
        (
            {"messages": [ASKED, answer("A1")], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs sets tools",
        ),
    ],
)
def test_parts_and_settings_that_cannot_be(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read_examples(row, "messages", "sft", ())


def test_keys_of_both_notations_in_one_message() -> None:
    written = [{"from": "human", "content": "Q1"}, {"role": "assistant", "value": "A1"}]
    read = turns_of(written, "messages")
    assert [(turn["role"], turn["content"]) for turn in read] == [
        ("user", "Q1"),
        ("assistant", "A1"),
    ]


def test_tools_in_the_notation_of_anthropic() -> None:
    function = dict(TOOLS[0]["function"])
    function["input_schema"] = function.pop("parameters")
    read = normalise({"messages": [ASKED, answer("A1")], "tools": [function]}, "messages")
    assert isinstance(read, Conversation)
    assert read.context.tools == tuple(TOOLS)


def test_calls_and_results_may_have_numbers_as_ids() -> None:
    calling = {"role": "assistant", "tool_calls": [{**CALLS[0], "id": 7}]}
    row = {"messages": [ASKED, calling, {**RESULT, "tool_call_id": 7}, answer("A1")]}
    conversation = normalise(row, "messages")
    assert isinstance(conversation, Conversation)
    assert conversation.messages[1]["tool_calls"][0]["id"] == "7"
    assert conversation.messages[2]["tool_call_id"] == "7"


@pytest.mark.parametrize(
    "written",
    [
        json.dumps([ASKED, answer("A1")]),
        str([ASKED, answer("A1")]),  # as pandas writes CSV
        {"role": ["user", "assistant"], "content": ["Q1", "A1"]},
    ],
)
def test_messages_in_a_text_or_in_columns(written: Any) -> None:
    assert normalise({"messages": written}, "messages") == Conversation((ASKED, answer("A1")))


@pytest.mark.parametrize("column", ["messages", "prompt", "chosen"])
def test_text_of_messages_that_is_cut_off(column: str) -> None:
    row = {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}
    row[column] = json.dumps([ASKED, answer("A1")])[:-5]
    with pytest.raises(RowError, match="begins as messages, but is not valid JSON"):
        normalise(row, "preference")


SYSTEM_TURN = {"role": "system", "content": "S1"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, answer("A1")]},
        {"conversations": [ASKED, answer("A1")]},
        {"instruction": "Q1", "output": "A1"},
        {"prompt": "Q1", "completion": "A1"},
        {"prompt": [ASKED], "completion": "A1"},
        {"prompt": "Q1", "completion": "A1", "label": True},
        {"prompt": "Q1", "chosen": "A1", "rejected": "A2"},
        {"messages": [ASKED], "chosen": "A1", "rejected": "A2"},
        {"chosen": [ASKED, answer("A1")], "rejected": [ASKED, answer("A2")]},
        {"prompt": "Q1"},
    ],
)
def test_system_and_tools_beside_every_shape(row: dict[str, Any]) -> None:
    """Both reach the chat template, also where the prompt is text."""
    whole = {**row, "system": "S1", "functions": json.dumps([TOOLS[0]["function"]]), "tools": []}
    method = "kto" if "label" in row else "dpo" if "chosen" in row else "sft"
    method = "grpo" if row.keys() == {"prompt"} else method
    read = normalise(whole, detect_format([("f:1", whole)], method))
    for part in parts_of(read):
        messages = part.prompt if isinstance(part, Question) else part.messages
        assert messages[:2] == (SYSTEM_TURN, ASKED)
        assert part.context.tools == tuple(TOOLS)


def test_system_beside_texts_without_a_prompt() -> None:
    with pytest.raises(RowError, match="give the prompt as a column of its own"):
        normalise({"chosen": "I am", "rejected": "I was", "system": "S1"}, "preference")


def test_a_system_prompt_may_be_empty() -> None:
    """It replaces the one that a template has of its own."""
    messages = [{"role": "system", "content": ""}, ASKED, answer("A1")]
    assert normalise({"messages": messages}, "messages") == Conversation(tuple(messages))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill", "qwen3_5_think"])
def test_a_thought_of_which_the_prompt_has_the_beginning(name: str) -> None:
    """R1's answers, as a server returns them."""
    source = template(name)
    texts = []
    for content in ("<think>\nR1\n</think>\n\nA1", "R1\n</think>\n\nA1"):
        renderer = renderer_with(tokenizer_with(source), train_on_reasoning=False)
        (rendered,) = renderer.render([Conversation((ASKED, answer(content)))])
        (document,) = rendered.documents
        texts.append((renderer.tokenizer.decode(document.input_ids), document.trainable.sum()))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("row", "method", "unused"),
    [
        ({"prompt": "q", "completion": "a", "response": "b"}, "sft", {"response"}),
        (
            {"prompt": "q", "completion": "a", "tools": "hammer", "system": 4},
            "sft",
            {"tools", "system"},
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "input": "x"}, "dpo", {"input"}),
        ({"text": "q", "content": "a", "note": ""}, "pretrain", {"content"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "messages": [ASKED]}, "dpo", {"messages"}),
        ({"messages": [ASKED], "chosen": "a", "rejected": "b", "system": "S1"}, "dpo", set()),
    ],
)
def test_columns_that_nothing_reads(row: dict[str, Any], method: str, unused: set[str]) -> None:
    row_format = detect_format([("f:1", row)], method)
    assert unused_fields(row, row_format, method, (), lambda _: False) == unused


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "value": "1"}, {"text": ""}]
    assert turns_of([{"role": "user", "content": parts}], "messages") == [ASKED]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("ai", "assistant"),
        ("bot", "assistant"),
        ("GPT", "assistant"),
        ("model", "assistant"),
        ("human", "user"),
        ("User", "user"),
        ("developer", "system"),
        ("ipython", "tool"),
        ("observation", "tool"),
        ("tool_response", "tool"),
        ("function", "tool"),
    ],
)
def test_role_names(name: str, role: str) -> None:
    assert turns_of([{"role": name, "content": "x"}], "m") == [{"role": role, "content": "x"}]
    assert turns_of([{"from": name, "value": "x"}], "m") == [{"role": role, "content": "x"}]


def test_roles_can_be_renamed() -> None:
    call_from = {"name": "f", "arguments": {"from": "klient"}}
    calling = {"role": "assistant", "tool_calls": [call_from]}
    row = {"messages": [{"role": "klient", "content": "Q1"}, calling], "role": "klient"}
    assert with_roles(row, {"klient": "user"}) == {**row, "messages": [ASKED, calling]}


def test_sharegpt_calls_thoughts_and_results() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Q1"},
            {"from": "gpt", "value": "I look"},
            {"from": "function_call", "value": f"<think>\nR1\n</think>\n{TEXT}"},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "A1"},
        ],
        "tools": json.dumps([TOOLS[0]["function"]]),
    }
    conversation = normalise(row, "sharegpt")
    assert isinstance(conversation, Conversation)
    calling = {**CALLING, "content": "I look", "reasoning_content": "R1"}
    assert conversation.messages == (ASKED, calling, RESULT, answer("A1"))
    assert conversation.context.tools == tuple(TOOLS)


def test_harmony_channels_are_one_turn() -> None:
    messages = [
        {"role": "developer", "content": "S1"},
        user("Q1"),
        {"role": "assistant", "channel": "analysis", "content": "R1"},
        {
            "role": "assistant",
            "channel": "commentary",
            "recipient": "functions.get_weather",
            "content_type": "<|constrain|>json",
            "content": '{"city": "Paris"}',
        },
        {
            "role": "tool",
            "name": "functions.get_weather",
            "recipient": "assistant",
            "channel": "commentary",
            "content": "sunny",
        },
        {"role": "assistant", "channel": "analysis", "content": "R2"},
        {"role": "assistant", "channel": "final", "content": "A1"},
    ]
    assert turns_of(messages, "messages") == [
        {"role": "system", "content": "S1"},
        ASKED,
        {**CALLING, "reasoning_content": "R1"},
        {**RESULT, "name": "get_weather"},
        answer("A1", reasoning_content="R2"),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASKED, {**CALLING, "tool_calls": "{get"}], r"messages\[1\].tool_calls is not valid JSON"),
        (
            [ASKED, answer(None, tool_calls=[{"name": "f", "arguments": "{x"}])],
            r"messages\[1\].tool_calls\[0\].arguments is not valid JSON: .*begins '\{x'",
        ),
        (
            [ASKED, answer(None, tool_calls=[{"name": "f", "arguments": "[1]"}])],
            r"arguments is \[1\]; expected an object",
        ),
        ([ASKED, answer(None, tool_calls=[{"arguments": {}}])], "has no function name"),
        ([ASKED, {"from": "function_call", "value": "call f"}], "is not valid JSON"),
        ([ASKED, {**SUNNY}, answer("A1")], r"messages\[1\] is a tool's result without a call"),
        ([ASKED, answer("Hello."), RESULT, answer("A1")], "the turn before it calls no tool"),
        (
            [ASKED, answer(None, tool_calls=[call(1, "Paris")]), {**RESULT, "tool_call_id": "x"}],
            r"messages\[2\].tool_call_id 'x' is that of no call before it",
        ),
        ([ASKED, CALLING, RESULT, RESULT, answer("A1")], "one more tool result than there are"),
        (
            [ASKED, answer(None, tool_calls=[call(1, "Paris"), call(1, "Rome")])],
            r"messages\[1\].tool_calls\[1\].id 'abcdefgh1' is that of another call",
        ),
        (
            [
                *(ASKED, answer(None, tool_calls=[call(1, "Paris")]), SUNNY),
                answer(None, tool_calls=[call(1, "Rome")]),
            ],
            r"messages\[3\].tool_calls\[0\].id 'abcdefgh1' is that of another call",
        ),
        ([ASKED, answer("A1", weight=0.5)], r"messages\[1\].weight is 0.5; expected 0 or 1"),
        ([ASKED, answer("A1", train="no")], r"messages\[1\].train is 'no'; expected 0 or 1"),
        (
            [user([{"type": "image_url", "image_url": "x"}]), answer("A1")],  # type: ignore[arg-type]
            r"messages\[0\].content\[0\] is a part of type 'image_url'; only text",
        ),
        (
            [ASKED, {"role": "assistant", "channel": "analysis", "content": "R1"}],
            "no answer and no call follows the analysis",
        ),
        ([ASKED, answer("A1", channel="side")], "channel is 'side'; expected analysis"),
    ],
)
def test_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        normalise({"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", r"tools is not valid JSON"),
        ([5], r"tools\[0\] is 5; expected an object"),
        ([{"type": "function", "function": {}}], r"tools\[0\] has no name"),
        (
            [TOOLS[0], {"name": "get_weather", "description": "Another."}],
            "two different tools of the name 'get_weather'; rename one",
        ),
    ],
)
def test_refused_tools(tools: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        normalise({"messages": [ASKED, answer("A1")], "tools": tools}, "messages")


def test_a_tool_that_stands_twice_is_one() -> None:
    bare = {**TOOLS[0]["function"], "strict": None}  # the same in another form
    read = normalise(
        {"messages": [ASKED, answer("A1")], "tools": [TOOLS[0], bare, TOOLS[0]]}, "messages"
    )
    assert isinstance(read, Conversation) and read.context.tools == (TOOLS[0],)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def rows_of(path: Path) -> list[Any]:
    listed = path.stat()
    file = SourceFile(str(path.parent), path.name, listed.st_size, listed.st_mtime_ns)
    return [row for chunk in plan_chunks(file) for _, row in read_chunk(chunk, 2**20).rows]


def test_parquet_and_json_text_give_the_tokens_of_json_lines(tmp_path: Path) -> None:
    """Arrow's structs have all keys of the column; the template must not see them."""
    rows = [{"tools": [], **row} for row in CONVERSATIONS.values()]
    rows[0]["tools"] = [
        {
            "type": "function",
            "function": {"name": "ping", "description": "Waits.", "parameters": {"type": "object"}},
        }
    ]
    structs = rows_of(parquet(tmp_path / "structs.parquet", rows))
    texts = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    as_text = rows_of(parquet(tmp_path / "texts.parquet", texts))
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = tokenizer_with(template("qwen3"))
    renderer = renderer_with(tokenizer)
    for given in (rows_of(lines), structs, as_text):
        rendered = renderer.render([normalise(row, "messages") for row in given])
        expected = renderer.render([normalise(row, "messages") for row in rows])
        for got, reference in zip(rendered, expected, strict=True):
            assert got.error is None
            for one, other in zip(got.documents, reference.documents, strict=True):
                assert one.input_ids.tolist() == other.input_ids.tolist()
                assert one.trainable.tolist() == other.trainable.tolist()


PROMPT = [ASKED]
GOOD, BAD = [CALLING], [answer("I cannot know.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": GOOD[0], "rejected": BAD[0]},
        {"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
        {"chosen_messages": [*PROMPT, *GOOD], "rejected_messages": [*PROMPT, *BAD]},
        {"chosen": json.dumps([*PROMPT, *GOOD]), "rejected": json.dumps([*PROMPT, *BAD])},
    ],
)
def test_pairs_with_calls(row: dict[str, Any]) -> None:
    """Each answer's text and trained tokens are those of a plain rendering."""
    pair = normalise({**row, "tools": TOOLS}, "preference")
    assert isinstance(pair, PreferencePair)
    tokenizer = tokenizer_with(template("qwen3"))
    (document,) = renderer_with(tokenizer).render([pair])[0].documents
    cut = document.lengths[0]
    for answers, part in ((GOOD, slice(0, cut)), (BAD, slice(cut, None))):
        text = tokenizer.apply_chat_template([*PROMPT, *answers], tools=TOOLS, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            PROMPT, tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
        ids, trained = document.input_ids[part], document.trainable[part]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids[trained]) == text[len(prompt) :]


def test_a_pair_keeps_ids_out_of_the_comparison() -> None:
    """The common prompt may carry ids, which differ between the two conversations."""
    first, second = ([{**ASKED, "id": n}, answer(text)] for n, text in ((1, "A1"), (2, "A2")))
    pair = normalise({"chosen": first, "rejected": second}, "preference")
    assert isinstance(pair, PreferencePair) and isinstance(pair.chosen, Conversation)
    assert pair.chosen.first_trained == 1
    with pytest.raises(RowError, match="chosen and rejected are equal"):
        normalise({"prompt": PROMPT, "chosen": GOOD, "rejected": GOOD}, "preference")


def test_labelled_answers_and_prompts_with_tools() -> None:
    tokenizer = tokenizer_with(template("qwen2_5"))
    renderer = renderer_with(tokenizer)
    labelled = {"prompt": PROMPT, "completion": GOOD, "label": True, "tools": TOOLS}
    example = normalise(labelled, "labelled")
    assert isinstance(example, LabelledExample)
    (document,) = renderer.render([example])[0].documents
    written = f"<tool_call>\n{TEXT}\n</tool_call><|im_end|>\n"
    assert tokenizer.decode(document.input_ids[document.trainable]) == written
    question = normalise({"prompt": PROMPT, "tools": TOOLS}, "prompt")
    assert isinstance(question, Question)
    (document,) = renderer.render([question])[0].documents
    plain = tokenizer.apply_chat_template(
        PROMPT, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(document.input_ids) == plain
    assert not document.trainable.any()


def test_a_prompt_of_tools_that_the_template_does_not_render_is_refused() -> None:
    renderer = renderer_with(tokenizer_with(template("gemma")))
    question = normalise({"prompt": PROMPT, "tools": TOOLS}, "prompt")
    assert "renders no tools" in str(renderer.render([question])[0].error)


def test_the_reference_of_a_call_is_its_json() -> None:
    row = {"messages": [ASKED, CALLING], "tools": TOOLS}
    _, [(question, extra)] = read_examples(row, "messages", "grpo", ())
    assert isinstance(question, Question) and question.context.tools == tuple(TOOLS)
    assert extra is not None
    assert json.loads(extra["columns"]["reference"]) == [CALLS[0]["function"]]
    assert extra["columns"]["tools"] == TOOLS


MIXED: list[tuple[dict[str, Any], type[Any]]] = [
    ({"messages": [ASKED, answer("A1")]}, Conversation),
    (
        {"conversations": [{"from": "human", "value": "Q1"}, {"from": "ai", "value": "A1"}]},
        Conversation,
    ),
    ({"instruction": "Q1", "output": "A1"}, Conversation),
    ({"prompt": PROMPT, "completion": [answer("A1")]}, Conversation),
]


@pytest.mark.parametrize("source_format", ["messages", "sharegpt", "alpaca"])
def test_a_file_may_mix_formats(source_format: KnownFormat) -> None:
    for row, shape in MIXED:
        normalised, _ = read_examples(row, source_format, "sft", ())
        assert isinstance(normalised, shape)
        assert normalised.messages == (ASKED, answer("A1"))
    with pytest.raises(RowError):
        read_examples({"chosen": "a", "rejected": "b"}, source_format, "sft", ())


TRL_TYPES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("text", {"text": "T1 more"}, "sft", "text", "1 more</s>"),
    ("messages", {"messages": [ASKED, answer("A1")]}, "sft", "messages", "A1<|im_end|>\n"),
    ("prompt, text", {"prompt": "Q1"}, "grpo", "prompt", ""),
    ("prompt, messages", {"prompt": PROMPT}, "grpo", "prompt", ""),
    (
        "completion, text",
        {"prompt": "Q1", "completion": " A1"},
        "sft",
        "prompt_completion",
        " A1</s>",
    ),
    (
        "completion, messages",
        {"prompt": PROMPT, "completion": [answer("A1")]},
        "sft",
        "prompt_completion",
        "A1<|im_end|>\n",
    ),
    (
        "pair, text",
        {"prompt": "Q1", "chosen": " A1", "rejected": " A2"},
        "dpo",
        "preference",
        " A1</s> A2</s>",
    ),
    (
        "pair, messages",
        {"prompt": PROMPT, "chosen": [answer("A1")], "rejected": [answer("A2")]},
        "dpo",
        "preference",
        "A1<|im_end|>\nA2<|im_end|>\n",
    ),
    (
        "whole texts",
        {"chosen": "Q1 A1", "rejected": "Q1 B2"},
        "dpo",
        "preference",
        " A1</s> B2</s>",
    ),
    (
        "whole conversations",
        {"chosen": [*PROMPT, answer("A1")], "rejected": [*PROMPT, answer("A2")]},
        "dpo",
        "preference",
        "A1<|im_end|>\nA2<|im_end|>\n",
    ),
    (
        "label, text",
        {"prompt": "Q1", "completion": " A1", "label": False},
        "kto",
        "labelled",
        " A1</s>",
    ),
    (
        "label, messages",
        {"prompt": PROMPT, "completion": [answer("A1")], "label": True},
        "kto",
        "labelled",
        "A1<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(
    ("row", "method", "row_format", "trained"),
    [line[1:] for line in TRL_TYPES],
    ids=[line[0] for line in TRL_TYPES],
)
def test_each_type_of_trl(
    row: dict[str, Any], method: str, row_format: KnownFormat, trained: str
) -> None:
    assert detect_format([("f:1", row)], method) == row_format
    _, [(example, _)] = read_examples(row, row_format, method, ())
    tokenizer = tokenizer_with(template("qwen2_5"))
    (document,) = renderer_with(tokenizer).render([example])[0].documents
    assert tokenizer.decode(document.input_ids[document.trainable]) == trained


def test_stepwise_supervision_is_refused() -> None:
    row = {"prompt": "Q1", "completions": ["S1", "S2"], "labels": [True, False]}
    with pytest.raises(RowError, match="let map of the source join the steps to one completion"):
        read_examples(row, detect_format([("f:1", row)], "sft"), "sft", ())
