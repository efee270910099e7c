"""Tokens and loss masks, compared with independent constructions."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from finray.training.common.errors import InputError
from finray.training.data import encoding
from finray.training.data.chat import ChatTemplate, UnstableTemplate
from finray.training.data.render_settings import RenderSettings
from finray.training.data.rendering import Document, Renderer
from finray.training.data.shapes import (
    Completion,
    Conversation,
    LabelledExample,
    PreferencePair,
    Question,
    RowError,
    Text,
)

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
ONLY_END = MARKED.replace(
    "{% generation %}{{ m['content'] +", "{{ m['content'] }}{% generation %}{{"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ONLINE = {"kind": "grpo", "rewards": [{"file": "/r.py:f", "source": ""}]}
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


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_a_token_across_the_border_belongs_to_the_answer(
    make_renderer: Any, tokenizer: Any
) -> None:
    """The prompt "Answer: " and "yes" have the tokens "Answer:" and " yes"."""
    for prompt, answer in (("the model: ", "learns"), ("the answ", "er questions")):
        document = render_one(make_renderer(), Completion(prompt, answer))
        ids = [1, *ids_of(tokenizer, prompt + answer), 3]
        alone = [1, *ids_of(tokenizer, prompt)]
        assert ids[: len(alone)] != alone  # otherwise the test proves nothing
        common = next(n for n, pair in enumerate(zip(ids, alone, strict=False)) if len({*pair}) > 1)
        assert document.input_ids.tolist() == ids
        assert document.trainable.tolist() == [n >= common for n in range(len(ids))]


def test_no_token_stands_across_the_start_of_an_answer(make_renderer: Any, tokenizer: Any) -> None:
    """Its prompts end in a space, which the model does not write, though " answ" is one token."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] + ' the model ' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    renderer = make_renderer(chat_template=template)
    first, second = renderer.render([turns("one", "answ", "er two", "answ")])[0].documents
    prompt = ids_of(tokenizer, "one the model ")
    answer = ids_of(tokenizer, "answ")
    assert ids_of(tokenizer, "one the model answ") != prompt + answer
    assert first.input_ids.tolist() == prompt + answer
    assert first.trainable.tolist() == [False] * len(prompt) + [True] * len(answer)
    prompt = ids_of(tokenizer, "one the model answer two the model ")
    assert second.input_ids.tolist() == prompt + answer
    assert second.trainable.tolist() == [False] * len(prompt) + [True] * len(answer)


def test_pairs_and_labelled_answers_train_the_token_across_the_border(
    make_renderer: Any, tokenizer: Any
) -> None:
    good, bad = Completion("the model: ", "learns"), Completion("the model: ", "answers")
    renderer = make_renderer(method={"kind": "dpo"})
    document = render_one(renderer, PreferencePair(good, bad))
    cut = document.lengths[0]
    for answer, part in ((" learns", slice(0, cut)), (" answers", slice(cut, None))):
        ids, mask = document.input_ids[part], document.trainable[part]
        assert tokenizer.decode(ids[mask]) == f"{answer}<|im_end|>"
    document = render_one(make_renderer(method={"kind": "kto"}), LabelledExample(good, True))
    assert tokenizer.decode(document.input_ids[document.trainable]) == " learns<|im_end|>"


def test_a_prompt_to_continue_does_not_end_in_half_a_token(
    make_renderer: Any, tokenizer: Any
) -> None:
    """Its tokens are those before the first trained one, where the answer is trained."""
    row = Completion("the model: ", "learns")
    document = render_one(make_renderer(), row)
    before = document.input_ids[: document.trainable.argmax()].tolist()
    assert tokenizer.decode(before) == "<|bos|>the model:"
    prompt = make_renderer().prompt(row)
    assert prompt is not None
    assert (prompt.text, prompt.input_ids.tolist()) == ("the model: ", before)
    online = make_renderer(method=ONLINE, max_length=600)
    for question in (Question("the model: ", "learns"), Question("the model: ")):
        rendered = online.render([question])[0]
        assert rendered.documents[0].input_ids.tolist() == before
        assert rendered.cut == " "
        assert not rendered.documents[0].trainable.any()
    for text in ("the model:", "the answ", "one\n"):  # nothing is taken from these
        rendered = online.render([Question(text)])[0]
        assert rendered.documents[0].input_ids.tolist() == [1, *ids_of(tokenizer, text)]
        assert rendered.cut == ""


@pytest.mark.long
def test_special_tokens_in_a_text_are_not_doubled(make_renderer: Any, tokenizer: Any) -> None:
    """A text that holds them renders as one that lacks them."""
    for with_them, without in (
        (Text("<|bos|>one two"), Text("one two")),
        (Text("one two<|im_end|>"), Text("one two")),
        (Completion("<|bos|>one", " two"), Completion("one", " two")),
        (Completion("one", " two<|im_end|>"), Completion("one", " two")),
    ):
        document, plain = (render_one(make_renderer(), row) for row in (with_them, without))
        assert document.input_ids.tolist() == plain.input_ids.tolist()
        assert document.trainable.tolist() == plain.trainable.tolist()
    prompt = make_renderer().prompt(Completion("<|bos|>one", " two"))
    assert prompt is not None and prompt.input_ids.tolist() == [1, *ids_of(tokenizer, "one")]
    online = make_renderer(method=ONLINE, max_length=600)
    document = render_one(online, Question("<|bos|>one"))
    assert document.input_ids.tolist() == [1, *ids_of(tokenizer, "one")]
    marked = make_renderer(chat_template="{{ bos_token }}" + MARKED)
    assert render_one(marked, turns("one", "two")).input_ids.tolist().count(1) == 1


@pytest.mark.parametrize(
    ("template", "notes"),
    [
        (MARKED, ()),
        (MARKED.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen"), ("no_end_trained",)),
        (PLAIN, ("no_end_trained",)),
        (PLAIN.replace("m['content']", "m['content'] + eos_token"), ()),
        (
            MARKED.replace(
                "{% generation %}{{ m['content'] +", "{{ m['content'] }}{% generation %}{{"
            ),
            ("only_end_trained",),
        ),
    ],
)
def test_odd_ends_are_noted(make_renderer: Any, template: str, notes: tuple[str, ...]) -> None:
    rendered = make_renderer(chat_template=template).render([turns("one", "two", "three", "a b c")])
    assert rendered[0].documents
    assert rendered[0].notes == notes


def test_an_answer_of_which_only_the_end_is_trained_is_noted(tokenizer: Any) -> None:
    """Without BOS, nothing predicts the first token, which prompt and answer share here."""
    settings = RenderSettings("/m", None, False, None, False, False, 64, "drop")
    renderer = Renderer(tokenizer, settings)
    renderer._lead = []
    assert len(ids_of(tokenizer, " answer")) == 1
    rendered = renderer.render([Completion(" answ", "er"), Completion("one", " two")])
    assert [row.notes for row in rendered] == [("only_end_trained",), ()]


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each_answer(
    make_renderer: Any, tokenizer: Any
) -> None:
    renderer = make_renderer(chat_template=THINKING, max_length=200)
    row = turns("one", "two", "three", "four")
    rendered = renderer.render([row])[0]
    template = ChatTemplate(THINKING, {})
    for document, at in zip(rendered.documents, (1, 3), strict=True):
        before = template.render(row.messages[:at], add_generation_prompt=True)
        whole = template.render(row.messages[: at + 1])
        assert document.input_ids.tolist() == ids_of(tokenizer, whole)
        assert document.trainable.tolist() == [
            index >= len(ids_of(tokenizer, before)) for index in range(len(document.input_ids))
        ]
    assert rendered.repeated == len(rendered.documents[0].input_ids)


def test_an_unstable_template_is_an_error(make_renderer: Any) -> None:
    row = turns("one", "two", "three", "four")
    renderer = make_renderer(chat_template=THINKING.replace("prompt %}{{ '", "prompt %}{{ 'now: "))
    error = renderer.render([row])[0].error
    assert isinstance(error, UnstableTemplate)
    assert "message 2" in str(error) and "data.chat_template" in str(error)
    trained = make_renderer(chat_template=THINKING, method={"kind": "sft", "train_on": "all"})
    assert render_one(trained, row).trainable.sum() > 0


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


@pytest.mark.long
def test_a_long_row_takes_the_memory_of_its_tokens_once(
    make_renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their ids and marks take 5 bytes a token; a Chinese character, 3 bytes, is 3 tokens here."""
    monkeypatch.setattr(encoding, "WINDOW", 300)
    monkeypatch.setattr(encoding, "_OVERLAP", 60)
    renderer = make_renderer(max_length=4096)

    def peak(characters: int) -> int:
        text = "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(characters))
        tracemalloc.start()
        documents = renderer.render([Text(text)])[0].documents
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(len(document.input_ids) for document in documents) > 2 * characters
        return most

    peak(1000)
    assert peak(40_000) - peak(20_000) < 7 * 3 * 20_000


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
