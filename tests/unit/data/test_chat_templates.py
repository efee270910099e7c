"""What is learnt is what the model will have to write: every template that TRL ships, rows of every
shape, compared with a plain `apply_chat_template`."""

from datetime import date
from typing import Any

import numpy as np
import pytest
from support.chat_templates import (
    CONVERSATIONS,
    NAMES,
    SECOND,
    THOUGHT,
    TOOLS,
    answer,
    renderer_with,
    template,
    tokenizer_with,
    user,
)

from finray.training.config.sections import TEMPLATE_DATE
from finray.training.data.formats import normalise

NO_TOOLS = {"cohere", "cohere2", "gemma", "gemma3", "idefics3", "llama3", "llava_next", "phi3"}
NO_TOOLS |= {"phi3_5", "qwen2_5_vl", "smolvlm", "deepseek_r1_distill", "deepseekv3"}
NO_REASONING = {
    "cohere",
    "cohere2",
    "gemma",
    "gemma3",
    "idefics3",
    "llama3",
    "llama3_1",
    "llama3_2",
}
NO_REASONING |= {"llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "smolvlm", "lfm2"}
NO_REASONING |= {"lfm2_v2", "qwen3_instruct_2507", "qwen3_vl", "gemma4_v2"}
NO_REASONING |= {"gemma4", "gemma4_v3", "gemma4_v4"}  # none in a last answer without calls
NO_REASONING |= {"qwen3_5_nothink"}  # its prompt closes the thought
WITH_CALLS = {"call", "result", "call with text", "call with thought", "calls", "parallel calls"}
REFUSED = {
    "gemma": {"system"},
    "lfm2": WITH_CALLS,
    "llama3_1": {"call with text", "parallel calls"},
    "llama3_2": {"call with text", "parallel calls"},
    "muse_glimmer": {"call with text"},
    "gptoss": {"parallel calls"},
}
THINKING_KEY = {"gptoss", "lfm2_2_5"}
EMPTY_TEXT = {"glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "qwen3_vl"}
PARTS = {"idefics3", "llava_next", "smolvlm"}
TAGS = {"deepseek_r1_distill", "deepseekv3"}


def is_refused(name: str, shape: str) -> bool:
    """True if the template has no place for a part of the conversation."""
    messages = CONVERSATIONS[shape]["messages"]
    return (
        (name in NO_TOOLS and "tools" in CONVERSATIONS[shape])
        or (name in NO_REASONING and any("reasoning_content" in m for m in messages))
        or shape in REFUSED.get(name, ())
    )


def plain(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message as a user of transformers writes it for a template."""
    changed = dict(message)
    thought = changed.get("reasoning_content")
    if name in THINKING_KEY and thought:
        changed["thinking"] = changed.pop("reasoning_content")
    if name in TAGS and thought:
        changed["content"] = f"<think>\n{thought}\n</think>\n\n{changed['content']}"
    if name in EMPTY_TEXT and changed["content"] is None:
        changed["content"] = ""
    if name in PARTS:
        changed["content"] = [{"type": "text", "text": changed["content"]}]
    return changed


def runs(trainable: Any) -> list[tuple[int, int]]:
    """The stretches of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], trainable, [False])).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_is_what_the_model_will_have_to_write(name: str) -> None:
    tokenizer = tokenizer_with(template(name))
    renderer = renderer_with(tokenizer)
    rows = {shape: normalise(row, "messages") for shape, row in CONVERSATIONS.items()}
    for shape, rendered in zip(rows, renderer.render(list(rows.values())), strict=True):
        if is_refused(name, shape):
            assert rendered.error is not None, shape
            continue
        assert rendered.error is None, (shape, rendered.error)
        row = CONVERSATIONS[shape]
        messages = [plain(name, message) for message in row["messages"]]
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        stretches = [(d, run) for d in rendered.documents for run in runs(d.trainable)]
        assert len(stretches) == len(answers), shape
        for at, (document, (start, stop)) in zip(answers, stretches, strict=True):
            before = prompt_of(tokenizer, messages[:at], row.get("tools"))
            assert tokenizer.decode(document.input_ids[:start]) == before, shape
            assert document.input_ids[:start].tolist() == ids_of(tokenizer, before), shape
            written = tokenizer.decode(document.input_ids[start:stop])
            check_written(row["messages"][at], written)
            whole = rendering_of(tokenizer, messages[: at + 1], row.get("tools"))
            if whole.startswith(before):
                end = "" if name != "glm4moe" else ends_of_glm(messages[at])
                assert written == whole[len(before) :] + end, shape


def ends_of_glm(message: dict[str, Any]) -> str:
    """GLM ends a turn with the next one's mark, which a conversation's last turn lacks."""
    return "<|observation|>" if "tool_calls" in message else "<|user|>"


def check_written(message: dict[str, Any], written: str) -> None:
    assert (message["content"] or "").strip() in written
    assert (message.get("reasoning_content") or "") in written
    for call in message.get("tool_calls", ()):
        assert call["function"]["arguments"]["city"] in written
    assert "degrees" not in written, "a tool's result is not learnt"


def rendering_of(tokenizer: Any, messages: list[Any], tools: Any, **more: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more)
    for form in ("%Y-%m-%d", "%d %b %Y"):  # in these, some templates write today
        text = text.replace(date.today().strftime(form), TEMPLATE_DATE.strftime(form))
    return text


def prompt_of(tokenizer: Any, messages: list[Any], tools: Any) -> str:
    return rendering_of(tokenizer, messages, tools, add_generation_prompt=True)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "gptoss", "lfm2_2_5_v2", "qwen3_5_think"])
def test_reasoning_can_be_context_only(name: str) -> None:
    renderer = renderer_with(tokenizer_with(template(name)), train_on_reasoning=False)
    row = normalise(CONVERSATIONS["thoughts"], "messages")
    rendered = renderer.render([row])[0]
    assert rendered.error is None
    tokenizer = renderer._tokenizer
    trained = "".join(tokenizer.decode(d.input_ids[d.trainable]) for d in rendered.documents)
    assert THOUGHT not in trained and SECOND not in trained
    assert "A1" in trained and "A2" in trained
    has_thoughts = any(SECOND in tokenizer.decode(d.input_ids) for d in rendered.documents)
    assert has_thoughts == (name != "qwen2_5")  # which renders none


def test_a_prompt_that_closes_the_thought_leaves_the_reasoning_out_where_it_is_not_trained() -> (
    None
):
    row = normalise(CONVERSATIONS["thought"], "messages")
    tokenizer = tokenizer_with(template("qwen3_5_nothink"))
    refused = renderer_with(tokenizer).render([row])[0].error
    assert "enable_thinking" in str(refused)
    (document,) = renderer_with(tokenizer, train_on_reasoning=False).render([row])[0].documents
    assert tokenizer.decode(document.input_ids[document.trainable]) == "A1<|im_end|>\n"
    thinking = {**CONVERSATIONS["thought"], "chat_template_kwargs": {"enable_thinking": True}}
    (document,) = renderer_with(tokenizer).render([normalise(thinking, "messages")])[0].documents
    written = f"{THOUGHT}\n</think>\n\nA1<|im_end|>\n"
    assert tokenizer.decode(document.input_ids[document.trainable]) == written


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("qwen3", 1),
        ("deepseek_r1_distill", 1),
        ("llama3", 1),
        ("muse_glimmer", 1),  # which reads the clock
        ("lfm2_2_5", 1),  # which marks its answers itself
    ],
)
def test_training_templates_make_one_example_of_a_conversation(name: str, texts: int) -> None:
    """The marked text of TRL's training template, in all its tokens."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = tokenizer_with(template(name))
    source = get_training_chat_template(tokenizer) or template(name)
    row = CONVERSATIONS["two answers"]
    today = date.today().isoformat()
    renderer = renderer_with(tokenizer, template="training", date=today)
    documents = renderer.render([normalise(row, "messages")])[0].documents
    assert len(documents) == texts
    expected = tokenizer.apply_chat_template(
        row["messages"], chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    assert documents[0].input_ids.tolist() == expected["input_ids"]
    assert documents[0].trainable.tolist() == list(map(bool, expected["assistant_masks"]))


def test_a_pair_with_calls_is_one_text_in_the_training_template() -> None:
    """Without reasoning Qwen3's own template rewrites the call once its result follows."""
    row = {"prompt": [{"role": "user", "content": "Rain?"}], "tools": TOOLS}
    for name, city in (("chosen", "Paris"), ("rejected", "Rome")):
        call = {"function": {"name": "get_weather", "arguments": {"city": city}}}
        row[name] = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "No."},
        ]
    tokenizer = tokenizer_with(template("qwen3"))
    pair = normalise(row, "preference")
    (own,) = renderer_with(tokenizer).render([pair])
    assert "set data.template: training" in str(own.error)
    (document,) = renderer_with(tokenizer, template="training").render([pair])[0].documents
    trained = tokenizer.decode(document.input_ids[document.trainable])
    assert len(document.lengths) == 2 and "sunny" not in trained
    assert trained.count("get_weather") == 2 and trained.count("No.<|im_end|>") == 2


def test_a_day_other_than_today_is_written() -> None:
    tokenizer = tokenizer_with(template("llama3_2"))
    row = normalise(CONVERSATIONS["one answer"], "messages")
    for day, written in (("2026-01-31", "31 Jan 2026"), ("2025-12-24", "24 Dec 2025")):
        (document,) = renderer_with(tokenizer, date=day).render([row])[0].documents
        assert f"Today Date: {written}" in tokenizer.decode(document.input_ids)


@pytest.mark.parametrize("train_on", ["completions", "last", "all"])
def test_messages_of_weight_0_are_not_trained(train_on: str) -> None:
    tokenizer = tokenizer_with(template("qwen2_5"))
    renderer = renderer_with(
        tokenizer, train_on_all=train_on == "all", train_on_last=train_on == "last"
    )
    for key, zero in (("weight", 0), ("train", False), ("loss", False), ("loss_weight", 0.0)):
        messages = [user("Q1"), answer("A1", **{key: zero}), user("Q2"), answer("A2")]
        (document,) = renderer.render([normalise({"messages": messages}, "messages")])[0].documents
        trained = tokenizer.decode(document.input_ids[document.trainable])
        assert "A1" not in trained and trained.endswith("A2<|im_end|>\n")
        assert ("Q1" in trained) == (train_on == "all")
    messages = [user("Q1"), answer("A1"), user("Q2"), answer("A2", weight=0)]
    rendered = renderer.render([normalise({"messages": messages}, "messages")])[0]
    trained = [tokenizer.decode(d.input_ids[d.trainable]) for d in rendered.documents]
    assert not any("A2" in text for text in trained)
    assert len(trained) == (train_on != "last")


def test_only_the_last_answer() -> None:
    tokenizer = tokenizer_with(template("qwen3"))
    renderer = renderer_with(tokenizer, train_on_last=True)
    row = CONVERSATIONS["calls"]
    (document,) = renderer.render([normalise(row, "messages")])[0].documents
    plain_text = tokenizer.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False)
    assert tokenizer.decode(document.input_ids) == plain_text
    written = "<think>\n\n</think>\n\nA2<|im_end|>\n"
    assert tokenizer.decode(document.input_ids[document.trainable]) == written


TRICKY = [
    *("A1", " A1", "A1\n\n", "<think>x</think>A1", "A1 </think>", "user", "<|im_end|>"),
    *(
        "<tool_response>x</tool_response>",
        "漢字 🙂",
        "A" * 200,
        "\n\nA1",
        "0",
        "<|im_start|>user\n",
    ),
]


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_8", "glm4moe", "gptoss", "lfm2_v2"])
def test_conversations_of_one_form_are_read_as_each_is_alone(name: str) -> None:
    """A form that is known already spares renderings and changes no token."""
    tokenizer = tokenizer_with(template(name))
    rows = [
        normalise(
            {"messages": [user(first), answer(second), user("Q2"), answer(third)]}, "messages"
        )
        for number, first in enumerate(TRICKY)
        for second, third in [("A1", TRICKY[number - 1]), (TRICKY[number - 3], "A2")]
    ]
    together = renderer_with(tokenizer).render([*rows, *rows])
    for number, row in enumerate(rows):
        alone = renderer_with(tokenizer).render([row])[0]
        for rendered in (together[number], together[number + len(rows)]):
            assert str(rendered.error) == str(alone.error)
            assert len(rendered.documents) == len(alone.documents)
            for one, other in zip(rendered.documents, alone.documents, strict=True):
                assert one.input_ids.tolist() == other.input_ids.tolist()
                assert one.trainable.tolist() == other.trainable.tolist()
