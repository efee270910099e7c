"""Preference data in all formats: conversion to shapes, and refused rows."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.common.errors import InputError
from finray.training.config.methods import METHODS, RewardMethod
from finray.training.config.source import KnownFormat
from finray.training.data.examples import examples_of
from finray.training.data.formats import detect_format, normalise, read_examples
from finray.training.data.preference_formats import common_prefix
from finray.training.data.shapes import (
    Completion,
    Conversation,
    LabelledExample,
    PreferencePair,
    RowError,
)

from .conftest import SHARED, MakeRecipe, write_jsonl

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
HUMAN = {"from": "human", "value": "q"}
CHAT = PreferencePair(Conversation((USER, GOOD), 1), Conversation((USER, BAD), 1))
LONGER = PreferencePair(
    Conversation((USER, BAD, USER, GOOD), 3),
    Conversation((USER, BAD, USER, BAD), 3),
)

PAIRS: list[tuple[dict[str, Any], PreferencePair]] = [
    (
        {"prompt": "q", "chosen": " good", "rejected": " bad"},
        PreferencePair(Completion("q", " good"), Completion("q", " bad")),
    ),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, CHAT),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    # UltraFeedback: the prompt as text, and again in both conversations
    ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    # LLaMA-Factory's ranking shapes
    (
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        CHAT,
    ),
    (
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad", "system": "s"},
        PreferencePair(Conversation((SYSTEM, USER, GOOD), 2), Conversation((SYSTEM, USER, BAD), 2)),
    ),
    # Anthropic HH
    (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        CHAT,
    ),
    (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: bad\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad\n\nHuman: q\n\nAssistant: bad ",
        },
        LONGER,
    ),
    (
        {"chosen": "Once upon a time", "rejected": "Once upon two times"},
        PreferencePair(Completion("Once upon", " a time"), Completion("Once upon", " two times")),
    ),
    (
        {"chosen": "Once upon a time", "rejected": "Once upon an hour"},
        PreferencePair(Completion("Once upon", " a time"), Completion("Once upon", " an hour")),
    ),
    (
        {"chosen": "Q: 1?\nA:yes", "rejected": "Q: 1?\nA:yeah"},
        PreferencePair(Completion("Q: 1?\nA:", "yes"), Completion("Q: 1?\nA:", "yeah")),
    ),
]


@pytest.mark.parametrize(("row", "expected"), PAIRS)
def test_pairs(row: dict[str, Any], expected: PreferencePair) -> None:
    assert detect_format([("f:1", row)], "dpo") == "preference"
    assert normalise(row, "preference") == expected


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
SCORES = {"score_chosen": 8.5, "score_rejected": 8, "margin": 2, "gap": True}


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (None, None),
        ("margin", {"margin": 2.0}),
        (["score_chosen", "score_rejected"], {"margin": 0.5}),
        (["score_rejected", "margin"], {"margin": 6.0}),
    ],
)
def test_a_margin_is_what_the_recipe_asks_for(
    margin: Any, expected: dict[str, float] | None
) -> None:
    columns = RewardMethod(margin=margin).columns
    _, [(example, extra)] = read_examples({**PAIR, **SCORES}, "preference", "reward", columns)
    assert isinstance(example, PreferencePair)
    assert extra == expected


@pytest.mark.parametrize("value", ["big", None, float("nan"), float("inf"), True, 10**400, []])
def test_a_value_that_is_no_margin(value: Any) -> None:
    row = {**PAIR, "gap": value}
    with pytest.raises(RowError, match=r"^gap is .*; expected a number$"):
        read_examples(row, "preference", "reward", ("gap",))
    with pytest.raises(RowError, match=r"^score is missing; expected a number$"):
        read_examples(row, "preference", "reward", ("score", "gap"))
    for kind in ("reward", "dpo", "simpo", "kto"):  # whoever has no use for the column
        assert read_examples(row, "preference", kind, ())[1]


@pytest.mark.parametrize(
    "more",
    [
        {"margin": "big", "score_chosen": None, "score_rejected": "x"},
        {"label": "good", "messages": 3, "system": 4, "history": 5, "input": 6, "output": 7},
        {"completion": 1.5, "response": [], "text": {}, "content": None},
    ],
)
def test_other_columns_do_not_condemn_a_pair(more: dict[str, Any]) -> None:
    assert normalise({**PAIR, **more}, "preference") == normalise(PAIR, "preference")


@pytest.mark.parametrize("prompt", ["", None, 5, {"a": 1}])
def test_a_prompt_beside_whole_conversations_is_not_needed(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert normalise(row, "preference") == CHAT


LABELLED: list[tuple[dict[str, Any], LabelledExample]] = [
    (
        {"prompt": "q", "completion": "a", "label": True},
        LabelledExample(Completion("q", "a"), True),
    ),
    ({"prompt": "q", "response": "a", "label": 0}, LabelledExample(Completion("q", "a"), False)),
    (
        {"prompt": [USER], "completion": [GOOD], "label": False},
        LabelledExample(CHAT.chosen, False),
    ),
    ({"messages": [USER, GOOD], "label": True}, LabelledExample(CHAT.chosen, True)),
    ({"messages": [USER, BAD, USER, GOOD], "label": True}, LabelledExample(LONGER.chosen, True)),
    (
        {"conversations": [HUMAN, {"from": "gpt", "value": "bad"}], "kto_tag": False},
        LabelledExample(CHAT.rejected, False),
    ),
    ({"instruction": "q", "output": "good", "kto_tag": True}, LabelledExample(CHAT.chosen, True)),
]


@pytest.mark.parametrize(("row", "expected"), LABELLED)
def test_labelled(row: dict[str, Any], expected: LabelledExample) -> None:
    assert detect_format([("f:1", row)], "kto") == "labelled"
    assert normalise(row, "labelled") == expected


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("preference", {"prompt": "q", "chosen": "a"}, "rejected is missing"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": None}, "rejected is null"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        ("preference", {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "are equal"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": " "}, "rejected is empty"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected is int"),
        ("preference", {"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ("preference", {"chosen": "one", "rejected": "two"}, "no common prompt"),
        ("preference", {"chosen": "one", "rejected": "one two"}, "no common prompt"),
        ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "no common prompt"),
        (
            "preference",
            {"chosen": [USER, GOOD, USER], "rejected": [USER, GOOD, SYSTEM, BAD]},
            "first differ at message 3, which in chosen has the role user",
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [SYSTEM, GOOD], "rejected": [BAD]},
            "chosen does not begin with an assistant turn",
        ),
        (
            "labelled",
            {"prompt": "q", "completion": "a", "label": "maybe"},
            "label is 'maybe'; expect",
        ),
        ("labelled", {"prompt": "q", "completion": "a", "label": None}, "label is None"),
        ("labelled", {"prompt": "q", "completion": "a", "label": 2}, "label is 2"),
        ("labelled", {"prompt": "q", "completion": "a", "label": 0.5}, "label is 0.5"),
        ("labelled", {"label": True, "prompt": "q"}, "completion .* missing"),
        ("labelled", {"messages": [USER, GOOD, USER], "label": True}, "must be an assistant turn"),
    ],
)
def test_refused(row_format: KnownFormat, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        normalise(row, row_format)


letters = st.text("ab c", max_size=8)


@given(letters, letters, letters)
def test_the_common_prefix_is_the_longest(shared: str, left: str, right: str) -> None:
    first, second = shared + left + "x", shared + right + "y"
    cut = common_prefix(first, second)
    assert first[:cut] == second[:cut]
    assert len(shared) <= cut < min(len(first), len(second))
    assert first[cut] != second[cut] or cut == min(len(first), len(second)) - 1


turns = st.lists(st.sampled_from([USER, GOOD, BAD]), max_size=5)


@given(turns, turns, turns)
def test_conversations_first_differ_at_an_answer_or_are_refused(
    shared: list[Any], left: list[Any], right: list[Any]
) -> None:
    row = {"chosen": [*shared, *left, GOOD], "rejected": [*shared, *right, BAD]}
    try:
        pair = normalise(row, "preference")
    except RowError:
        return
    assert isinstance(pair, PreferencePair)
    chosen, rejected = pair.chosen, pair.rejected
    assert isinstance(chosen, Conversation) and isinstance(rejected, Conversation)
    assert [*chosen.messages] == row["chosen"] and [*rejected.messages] == row["rejected"]
    cut = chosen.first_trained
    assert cut == rejected.first_trained > 0
    assert chosen.messages[:cut] == rejected.messages[:cut]
    assert chosen.messages[cut]["role"] == rejected.messages[cut]["role"] == "assistant"


words = st.text("one two", min_size=1, max_size=20).filter(str.strip)


@settings(deadline=None)
@given(words, words, words)
def test_each_half_is_tokenised_as_alone(
    make_pair_renderer: Any, prompt: str, first: str, second: str
) -> None:
    """Two answers in the same row are tokenised as they are separately."""
    pair = PreferencePair(*(Completion(prompt, answer) for answer in (first, second)))
    together = make_pair_renderer.render([pair])[0].documents
    alone = make_pair_renderer.render([pair.chosen, pair.rejected])
    if any(not rendered.documents for rendered in alone):
        assert not together
        return
    halves = [rendered.documents[0] for rendered in alone]
    assert together[0].lengths == tuple(len(half.input_ids) for half in halves)
    assert together[0].input_ids.tolist() == [*halves[0].input_ids, *halves[1].input_ids]
    assert together[0].trainable.tolist() == [*halves[0].trainable, *halves[1].trainable]


@pytest.fixture(scope="module")
def make_pair_renderer(tokenizer: Any, model: Any) -> Any:
    from finray.training.config.recipe import recipe_from_dict
    from finray.training.data.render_settings import RenderSettings
    from finray.training.data.rendering import Renderer

    recipe = recipe_from_dict(
        {
            "name": "t",
            "model": {"base": str(model)},
            "method": {"kind": "dpo"},
            "data": {"train": [{"path": "/nowhere.jsonl"}], "max_length": 16},
        }
    )
    return Renderer(tokenizer, RenderSettings.of(recipe))


def test_a_pair_is_two_labelled_answers_for_kto() -> None:
    assert examples_of(CHAT, "kto") == (
        LabelledExample(CHAT.chosen, True),
        LabelledExample(CHAT.rejected, False),
    )


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("sft", PAIRS[0][0], "sft learns from .* pairs of a chosen and .* use method dpo or"),
        (
            "sft",
            LABELLED[0][0],
            "sft learns .* one of the answers with a label; use method kto",
        ),
        ("dpo", {"messages": [USER, GOOD]}, "dpo learns from pairs .* conversations; .* sft"),
        ("reward", LABELLED[0][0], "reward learns from pairs .* use method kto"),
        ("kto", {"text": "t"}, "kto learns from answers with a label, .* plain texts"),
    ],
)
def test_data_of_another_method(
    make_recipe: MakeRecipe, tmp_path: Any, kind: str, row: dict[str, Any], message: str
) -> None:
    """The inspection refuses it, with the place and the methods for such rows."""
    from finray.training.inspection import inspect_recipe

    assert kind in METHODS
    data = write_jsonl(tmp_path / "a.jsonl", [row] * 64)
    with pytest.raises(InputError, match=rf"a\.jsonl:1: method {message}"):
        inspect_recipe(make_recipe(train=data, method={"kind": kind}))


def test_real_ranking_data() -> None:
    path = SHARED / "dpo_en_demo.json"
    if not path.exists():
        pytest.skip(f"needs {path}, which lies beside the project")
    rows = json.loads(path.read_text(encoding="utf-8"))
    places = [(f"f:{number}", row) for number, row in enumerate(rows)]
    assert detect_format(places, "dpo") == "preference"
    for row in rows:
        pair = normalise(row, "preference")
        assert isinstance(pair, PreferencePair) and isinstance(pair.chosen, Conversation)
        assert pair.chosen.first_trained == len(row["conversations"])
        assert pair.chosen.messages[-1]["content"] == row["chosen"]["value"]
