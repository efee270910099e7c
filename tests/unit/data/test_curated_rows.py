"""Odd rows on their way through stages: each is used as without stages, or counted."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.cluster.screens.curation import render_curation
from finray.training.common.errors import InputError, RunError
from finray.training.common.storage import Folder
from finray.training.config.curation import RedactStage
from finray.training.data.curation.funnel import mean_lengths
from finray.training.data.curation.redact import redact
from finray.training.data.curation.stage import Item, Reading
from finray.training.data.curation.texts import compared_texts, rewritten
from finray.training.data.shown_rows import show_rows
from finray.training.run import curate_data

from .conftest import MakeRecipe, chat_row, write_jsonl
from .test_curation import funnel, left, run, text_of

Row = dict[str, Any]
MAIL = "ada@mail.example"
CALLS = Reading("messages", "sft", ())
NO_CONTEXT: Any = None


def call(arguments: Any) -> Row:
    function = {"name": "send", "arguments": arguments}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    return {"messages": [{"role": "user", "content": "send it"}, turn]}


@pytest.mark.parametrize("curate", [["normalise"], ["deduplicate"]])
@pytest.mark.parametrize(
    ("column", "type_name"),
    [(pa.array([b"one", b"two"]), "bytes"), (pa.array([datetime.date(2020, 1, 1)] * 2), "date")],
)
def test_values_that_are_no_text_do_not_become_text(
    tmp_path: Path, make_recipe: MakeRecipe, curate: list[str], column: Any, type_name: str
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    recipe = make_recipe(train=tmp_path / "a.parquet", curate=curate, method={"kind": "pretrain"})
    problem = f"text is of type {type_name}; expected text"
    with pytest.raises(InputError, match=rf"a\.parquet:1: {problem}"):
        run(recipe, tmp_path)
    (shown, _) = show_rows(recipe, 2, Folder(str(tmp_path / "prepared"))).rows
    assert shown.problem == f"not usable: {problem}"


def test_values_beside_the_texts_may_be_of_any_type(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    table = pa.table({"text": [text_of(1), text_of(2)], "day": [datetime.date(2020, 1, 1)] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    recipe = make_recipe(
        train=tmp_path / "a.parquet",
        curate=["normalise"],
        method={"kind": "pretrain"},
        max_length=512,
    )
    assert left(run(recipe, tmp_path)) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "masked"),
    [
        ({"from": MAIL, "id": [MAIL], "n": 1}, {"from": "[email]", "id": ["[email]"], "n": 1}),
        ({"card": 4111111111111111}, {"card": "[card]"}),
        ({MAIL: 1, f"b{MAIL}": 2, "n": 3}, {"[email]": 1, "[email]_1": 2, "n": 3}),
        (
            {f"{n}{MAIL}": n for n in range(5000)},
            {"[email]" + f"_{n}" * (n > 0): n for n in range(5000)},
        ),
        (json.dumps({"text": f"Hi\n{MAIL}"}), '{"text": "Hi\\n[email]"}'),
        ('{ "card":4111111111111111, "n":1 }', '{ "card":"[card]", "n":1 }'),
        (
            json.dumps({"a": json.dumps({"b": f"\t{MAIL}"})}),
            '{"a": "{\\"b\\": \\"\\\\t[email]\\"}"}',
        ),
    ],
)
def test_the_arguments_of_a_call_are_masked_and_stay_readable(arguments: Any, masked: Any) -> None:
    item = Item.read(0, 1, call(arguments), CALLS, None)
    (outcome,) = redact(RedactStage(), NO_CONTEXT)([item])
    assert outcome.row == call(masked)
    item.with_row(call(masked), CALLS)


@pytest.mark.parametrize(
    ("result", "masked"),
    [
        ({"from": MAIL, "id": [MAIL]}, {"from": "[email]", "id": ["[email]"]}),
        ([{"name": MAIL, "card": 4111111111111111}], [{"name": "[email]", "card": "[card]"}]),
        ([{"type": "text", "text": MAIL}], [{"type": "text", "text": "[email]"}]),
    ],
)
def test_data_that_a_tool_returns_is_masked(result: Any, masked: Any) -> None:
    def answered(content: Any) -> Row:
        turns = [{"role": "tool", "content": content}, {"role": "assistant", "content": "Done."}]
        return {"messages": [*call({})["messages"], *turns]}

    item = Item.read(0, 1, answered(result), CALLS, None)
    (outcome,) = redact(RedactStage(), NO_CONTEXT)([item])
    assert outcome.row == answered(masked)


def test_normal_forms_keep_json_readable() -> None:
    text = '{"a": "\uff02\uff3c"}'
    assert json.loads(rewritten({"a": text}, lambda t: t.replace("\uff02", '"'))["a"]) == {
        "a": '"\uff3c'
    }
    for plain in ("[email] and more", "{", "[1, 2", '"{}"'):
        assert rewritten({"a": plain}, str.upper)["a"] == plain.upper()


def test_arguments_are_compared_whatever_their_names() -> None:
    items = [Item.read(0, 1, call({"name": name}), CALLS, None) for name in ("Ada", "Bob")]
    assert [compared_texts(item.example)[-1] for item in items] == ["Ada", "Bob"]


def test_conversations_of_which_other_turns_are_trained_are_not_equal(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    def row(weight: int) -> Row:
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        messages: list[Row] = [{"role": role, "content": text} for role, text in turns]
        messages[1]["weight"] = weight
        return {"messages": messages}

    data = write_jsonl(tmp_path / "a.jsonl", [row(0), row(1), row(0)])
    prepared = run(make_recipe(train=data, curate=["deduplicate"]), tmp_path)
    assert funnel(prepared)[1] == ("2 deduplicate", 3, 2, {"equal to an earlier row": 1})


@pytest.mark.parametrize(
    "curate",
    [
        [],
        [{"kind": "deduplicate", "near": {"jaccard": 0.99}}],
        [{"kind": "deduplicate", "near": {"ngram": 40}}],
        [{"kind": "deduplicate", "near": {}}, "redact"],
    ],
)
def test_nearly_equal_rows_that_are_left_are_held_out_together(
    tmp_path: Path, make_recipe: MakeRecipe, curate: list[Any]
) -> None:
    # In the last case only the masks make the rows of a pair nearly equal.
    def end(name: str) -> str:
        mails = "".join(f"{name}{n}@{name}{n}.example " for n in range(10))
        return f"{mails if len(curate) > 1 else ''}{f' {name}' * 4}"

    rows = [{"text": f"{text_of(n, 60)} {end(name)}"} for n in range(40) for name in ("a", "b")]
    recipe = make_recipe(
        train=write_jsonl(tmp_path / "a.jsonl", rows),
        curate=curate,
        holdout={"share": 0.5},
        method={"kind": "pretrain"},
        max_length=1024,
    )
    prepared = run(recipe, tmp_path)
    assert funnel(prepared)[-1][2] == len(rows)
    pairs = [{number // 2 for number in left(prepared, split)} for split in ("train", "eval")]
    assert all(pairs) and not pairs[0] & pairs[1]


def test_a_group_is_a_column_of_the_source_whatever_becomes_of_it(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    code = "def short(row):\n    return {'text': row['body']}\n"
    rows = [{"body": f"{text_of(n)}", "user": n % 10} for n in range(60)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    function = {"file": "rows.py:short", "source": code}
    by_user = []
    for changes in ({"columns": {"text": "body"}}, {"map": function}):
        recipe = make_recipe(
            train=[{"path": str(data), **changes}],
            holdout={"share": 0.5, "group_by": "user"},
            method={"kind": "pretrain"},
            max_length=512,
        )
        prepared = run(recipe, tmp_path)
        by_user.append([{n % 10 for n in left(prepared, split)} for split in ("train", "eval")])
    assert by_user[0] == by_user[1] and not by_user[0][0] & by_user[0][1]


@pytest.mark.parametrize("stage", ["normalise", "redact"])
def test_a_row_that_is_nested_too_deeply_is_counted(
    tmp_path: Path, make_recipe: MakeRecipe, stage: str
) -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": text_of(1), "deep": deep}, {"text": "b"}])
    recipe = make_recipe(
        train=data, curate=[stage], method={"kind": "pretrain"}, max_bad_rows=0.5, max_length=512
    )
    prepared = run(recipe, tmp_path)
    assert funnel(prepared) == [(f"1 {stage}", 2, 1, {"bad_row": 1})]
    assert left(prepared) == [1]


def test_rows_that_cannot_be_used_have_no_length_and_stand_in_their_order(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    code = "def keep(row):\n    if row['text'][0] == 'x':\n        raise ValueError('a\\nb')\n"
    code += "    return True\n"
    rows = [{"text": "x" * 50}, {"text": "y" * 10}, {"text": None}, {"text": "z" * 20}]
    recipe = make_recipe(
        train=write_jsonl(tmp_path / "a.jsonl", rows),
        curate=[{"kind": "keep", "with": {"file": "rows.py:keep", "source": code}}],
        method={"kind": "pretrain"},
        max_bad_rows=0.5,
    )
    prepared = run(recipe, tmp_path)
    (stage,) = prepared.manifest.funnel
    assert (stage["rows_in"], stage["rows_out"], stage["dropped"]) == (4, 2, {"bad_row": 2})
    assert mean_lengths(stage) == (15, 15)
    bad = [json.loads(line) for line in prepared.folder.read("quarantine.jsonl").splitlines()]
    assert [row["line"] for row in bad] == [1, 3]
    assert bad[0]["reason"].startswith("keep keep raises ValueError: a b (File")


def test_a_report_on_storage_that_cannot_be_written(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    recipe = make_recipe(train=data, curate=["normalise"], method={"kind": "pretrain"})
    recipe = recipe.model_copy(update={"storage": str(tmp_path / "runs")})
    stages = tmp_path / "runs" / "prepared" / "stages"
    stages.parent.mkdir(parents=True)
    stages.write_text("no folder")
    with pytest.raises(RunError, match=r"^.*prepared: cannot write the prepared data: "):
        curate_data(recipe)
    stages.unlink()
    assert curate_data(recipe)["sources"][0]["left"] == 1
    (manifest,) = stages.rglob("manifest.json")
    manifest.write_text('{"kind": "normalise", "chunks": []}')
    assert curate_data(recipe)["sources"][0]["left"] == 1


@pytest.mark.parametrize(
    ("against", "problem"),
    [
        ('{"question": "a"}\n{broken\n', r"1 of 2 rows to compare with .*\n.*bench\.jsonl:2: not"),
        ('{"answer": 4}\n{"answer": "?"}\n', "the evaluation data has no words to compare with"),
    ],
)
def test_evaluation_data_with_nothing_to_compare_is_refused(
    tmp_path: Path, make_recipe: MakeRecipe, against: str, problem: str
) -> None:
    (tmp_path / "bench.jsonl").write_text(against)
    stage = {"kind": "decontaminate", "against": str(tmp_path / "bench.jsonl")}
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    recipe = make_recipe(train=data, curate=[stage], method={"kind": "pretrain"})
    with pytest.raises(InputError, match=rf"^data\.curate\.0: .*{problem}"):
        run(recipe, tmp_path)


def test_opposite_preferences_are_not_nearly_equal(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    def pair(chosen: int, rejected: int, end: str = "") -> Row:
        answers = [f"{text_of(seed, 60)} {end}" for seed in (chosen, rejected)]
        return {"prompt": "which?", "chosen": answers[0], "rejected": answers[1]}

    rows = [pair(1, 2), pair(2, 1), pair(1, 2, "end")]
    recipe = make_recipe(
        train=write_jsonl(tmp_path / "a.jsonl", rows),
        curate=[{"kind": "deduplicate", "near": {}}],
        method={"kind": "dpo"},
        max_length=1024,
    )
    prepared = run(recipe, tmp_path)
    assert funnel(prepared)[1] == ("2 deduplicate", 3, 2, {"nearly equal to an earlier row": 1})
    assert left(prepared) == [0, 1]


@pytest.mark.parametrize("written", [json.dumps, str])
def test_conversations_that_are_text_are_masked_message_by_message(written: Any) -> None:
    turns = [("user", f"Hi\n{MAIL}"), ("assistant", "call\n+49 30 123456")]
    messages = [{"role": role, "content": content} for role, content in turns]
    item = Item.read(0, 1, {"messages": written(messages)}, CALLS, None)
    (outcome,) = redact(RedactStage(), NO_CONTEXT)([item])
    assert outcome.row is not None
    assert compared_texts(item.with_row(outcome.row, CALLS).example) == [
        "Hi\n[email]",
        "call\n[phone]",
    ]
    row = {"messages": written(messages)}
    assert rewritten(row, str) is row


def test_a_report_names_unusable_rows_and_fits_a_narrow_terminal(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    rows = [{"text": "\u6570\u5b66 \ud83d"}, {"text": "\u6570\u5b66"}, {"text": text_of(1)}]
    curate = [{"kind": "filter", "min_tokens": 20}]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    report = curate_data(
        make_recipe(
            train=data, curate=curate, method={"kind": "pretrain"}, max_length=512, max_bad_rows=0.5
        ).model_copy(update={"storage": str(tmp_path / "runs")})
    )
    reason = "text contains an unpaired surrogate, which is not a valid character"
    assert report["bad_rows"] == [{"place": f"{data}:1", "reason": reason}]
    screen = render_curation(report, 80)
    assert max(map(len, screen.splitlines())) <= 80
    # Lines are broken inside a long path, too.
    text = "".join(screen.split())
    assert f"{data}:1:{reason}".replace(" ", "") in text and '{"text":"\u6570\u5b66"}' in text


def test_a_report_of_fewer_rows_than_a_batch(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [chat_row("one", "two"), chat_row("one", "three")])
    recipe = make_recipe(train=data, curate=["deduplicate"], optim={"batch_size": 64})
    report = curate_data(recipe.model_copy(update={"storage": str(tmp_path / "runs")}))
    assert report["sources"][0]["left"] == 2
