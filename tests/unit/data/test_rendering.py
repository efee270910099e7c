"""Tokens and loss masks, compared with independent constructions."""

from typing import Any

import numpy as np
import pytest

from finray.training.common.errors import InputError
from finray.training.data.chat import ChatTemplate, UnstableTemplate
from finray.training.data.rendering import Document, Renderer
from finray.training.data.shapes import Completion, Conversation, RowError, Text

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PICKY = "{% if messages|length > 2 %}{{ raise_exception('two messages at most') }}{% endif %}"


def turns(*contents: str, system: str = "") -> Conversation:
    """user, assistant, user, … with these contents."""
    roles = ["user", "assistant"] * len(contents)
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    head = [{"role": "system", "content": system}] if system else []
    return Conversation(tuple(head + messages))


def render_one(renderer: Renderer, row: Any) -> Document:
    rendered = renderer.render([row])[0]
    assert rendered.error is None
    assert len(rendered.documents) == 1
    return rendered.documents[0]


def by_segments(tokenizer: Any, row: Conversation, with_newline: bool) -> tuple[Any, Any]:
    """ChatML assembled segment by segment; its markers keep tokens inside a segment."""
    ids: list[int] = []
    mask: list[bool] = []
    for message in row.messages:
        is_answer = message["role"] == "assistant"
        for text, trained in (
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", is_answer),
            ("\n", is_answer and with_newline),
        ):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            mask += [trained] * len(part)
    return ids, mask


@pytest.mark.parametrize(
    ("template", "with_newline"), [("chatml", True), (None, True), (MARKED, False)]
)
def test_mask_of_many_turns(
    make_renderer: Any, tokenizer: Any, template: str | None, with_newline: bool
) -> None:
    rows = [
        turns("one two", "three, four five", "six", "seven\n\neight", system="the model"),
        turns("a", "ä 漢字 🙂 answer", "questions", "learns", "one", "two"),
        turns("user\n<|im_end|>", " leading space "),
    ]
    renderer = make_renderer(chat_template=template, max_length=500)
    for row in rows:
        document = render_one(renderer, row)
        ids, mask = by_segments(tokenizer, row, with_newline)
        assert document.input_ids.tolist() == ids
        assert document.trainable.tolist() == mask
        assert document.input_ids.dtype == np.int32


def test_a_batch_is_its_rows(make_renderer: Any) -> None:
    renderer = make_renderer()
    rows = [turns("one", "two"), Completion("three", " four"), Text("five six"), turns("a", "the")]
    for row, rendered in zip(rows, renderer.render(rows), strict=True):
        alone = render_one(renderer, row)
        assert rendered.documents[0].input_ids.tolist() == alone.input_ids.tolist()
        assert rendered.documents[0].trainable.tolist() == alone.trainable.tolist()


def test_context_turns_are_not_trained(make_renderer: Any, tokenizer: Any) -> None:
    row = turns("one", "two three", "four", "five")
    for template in ("chatml", MARKED):
        renderer = make_renderer(chat_template=template)
        document = render_one(renderer, Conversation(row.messages, first_trained=3))
        trained = tokenizer.decode(document.input_ids[document.trainable])
        assert trained.rstrip("\n") == "five<|im_end|>"


def test_everything_is_trained_but_the_first_token(make_renderer: Any) -> None:
    renderer = make_renderer(method={"kind": "sft", "train_on": "all"})
    for row in (turns("one", "two"), Completion("one", "two"), Text("one two")):
        document = render_one(renderer, row)
        assert not document.trainable[0]
        assert document.trainable[1:].all()


def test_completion_has_bos_and_a_trained_end(make_renderer: Any, tokenizer: Any) -> None:
    document = render_one(make_renderer(), Completion("one two", " three four"))
    assert tokenizer.decode(document.input_ids) == "<|bos|>one two three four<|im_end|>"
    assert tokenizer.decode(document.input_ids[document.trainable]) == " three four<|im_end|>"


def test_a_token_across_the_boundary_is_not_trained(make_renderer: Any, tokenizer: Any) -> None:
    document = render_one(make_renderer(), Completion("the answ", "er questions"))
    answer = tokenizer(" answer", add_special_tokens=False)["input_ids"]
    assert len(answer) == 1  # otherwise the test proves nothing
    assert tokenizer.decode(document.input_ids[document.trainable]) == " questions<|im_end|>"


def test_an_unstable_template_is_an_error(make_renderer: Any) -> None:
    renderer = make_renderer(chat_template=THINKING)
    single, double = renderer.render([turns("one", "two"), turns("one", "two", "three", "four")])
    assert single.documents[0].trainable.any()
    assert isinstance(double.error, UnstableTemplate)
    assert "{% generation %}" in str(double.error)
    trained = make_renderer(chat_template=THINKING, method={"kind": "sft", "train_on": "all"})
    assert render_one(trained, turns("one", "two", "three", "four")).trainable.sum() > 0


def test_row_that_the_template_refuses(make_renderer: Any) -> None:
    renderer = make_renderer(chat_template=PICKY + MARKED)
    fine, refused = renderer.render([turns("one", "two"), turns("one", "two", "three", "four")])
    assert fine.documents
    assert isinstance(refused.error, RowError)
    assert "two messages at most" in str(refused.error)


def test_a_template_that_is_not_jinja_is_an_error(make_renderer: Any) -> None:
    renderer = make_renderer(chat_template="{% for %}")
    with pytest.raises(InputError, match=r"data\.chat_template: not valid Jinja, line 1"):
        renderer.render([turns("one", "two")])


class WithoutTemplate:
    """A tokenizer without a chat template, and with changed attributes."""

    def __init__(self, tokenizer: Any, **changes: Any) -> None:
        self._tokenizer = tokenizer
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return self._changes.get(name, getattr(self._tokenizer, name))

    def __call__(self, *values: Any) -> Any:
        return self._tokenizer(*values)

    def get_chat_template(self) -> str:
        raise ValueError("no template")


def test_a_missing_template_or_token_is_an_error(make_renderer: Any, tokenizer: Any) -> None:
    settings = make_renderer()._settings
    bare = Renderer(WithoutTemplate(tokenizer, eos_token_id=None), settings)
    with pytest.raises(InputError, match="has no chat template"):
        bare.render([turns("one", "two")])
    endless = Renderer(WithoutTemplate(tokenizer), settings)
    assert endless.render([Text("one")])[0].documents
    slow = WithoutTemplate(tokenizer, is_fast=False)
    with pytest.raises(InputError, match="a fast tokenizer"):
        Renderer(slow, settings)


def test_chatml_needs_its_tokens(make_renderer: Any, tokenizer: Any) -> None:
    settings = make_renderer(chat_template="chatml")._settings
    plain = WithoutTemplate(tokenizer, get_vocab=lambda: {"a": 1, "<|im_end|>": 2})
    with pytest.raises(InputError, match=r"chatml needs the tokens <\|im_start\|>, which"):
        Renderer(plain, settings).render([turns("one", "two")])


def test_overlong_rows(make_renderer: Any) -> None:
    row = turns("one", "two " * 40)
    dropped = make_renderer(max_length=16).render([row])[0]
    assert (dropped.documents, dropped.dropped) == ((), "overlong")
    cut = render_one(make_renderer(max_length=32, overlong="truncate"), row)
    whole = render_one(make_renderer(max_length=500), row)
    assert cut.input_ids.tolist() == whole.input_ids[:32].tolist()
    assert cut.trainable.tolist() == whole.trainable[:32].tolist()


def test_nothing_trainable_is_left(make_renderer: Any) -> None:
    rendered = make_renderer(max_length=16, overlong="truncate").render([turns("one " * 40, "two")])
    assert rendered[0].dropped == "no_trainable_token"


def test_long_text_is_split(make_renderer: Any, tokenizer: Any) -> None:
    text = "one two three four five six seven eight nine ten " * 9
    documents = make_renderer(max_length=16).render([Text(text)])[0].documents
    assert all(len(document.input_ids) == 16 for document in documents[:-1])
    joined = np.concatenate([document.input_ids for document in documents])
    assert tokenizer.decode(joined) == f"<|bos|>{text}<|im_end|>"
    for document in documents:
        assert not document.trainable[0]
        assert document.trainable[1:].all()


def test_pretraining_splits_conversations_too(make_renderer: Any) -> None:
    renderer = make_renderer(max_length=16, method={"kind": "pretrain"})
    documents = renderer.render([turns("one " * 20, "two " * 20)])[0].documents
    assert len(documents) > 2
    assert all(document.trainable[1:].all() for document in documents)


def test_prompts_of_held_out_rows(make_renderer: Any, tokenizer: Any) -> None:
    renderer = make_renderer()
    prompt = renderer.prompt(turns("one", "two", "three", "four"))
    assert prompt is not None
    assert prompt.text.endswith(
        "two<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.input_ids) == prompt.text
    assert prompt.reference == "four"
    prompt = renderer.prompt(Completion("one", " two"))
    assert prompt is not None
    assert (prompt.text, prompt.reference) == ("one", " two")
    assert tokenizer.decode(prompt.input_ids) == "<|bos|>one"
    assert renderer.prompt(Text("one")) is None


def test_a_template_can_use_the_special_tokens() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "x"}]) == "<s>x"
