"""Curation: stages, their funnel, what is done again, and what is refused."""

import errno
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.training.common.errors import InputError, RunError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data import sources
from finray.training.data.curation import plan
from finray.training.data.curation.funnel import funnel_facts, mean_lengths
from finray.training.data.curation.passes import group_of
from finray.training.data.curation.report import report_of
from finray.training.data.fingerprint import fingerprint
from finray.training.data.prepare import prepare
from finray.training.data.prepared import Manifest, Prepared
from finray.training.data.shapes import RowError
from finray.training.data.shown_rows import show_rows
from finray.training.data.tasks import RunTasks, run_in_process

from .conftest import MakeRecipe, chat_row, write_jsonl

Row = dict[str, Any]
WORDS = [f"w{n}" for n in range(500)]
PHONE = "+49 30 123456"


def text_of(seed: int, words: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def texts(*seeds: int) -> list[Row]:
    return [{"text": text_of(seed)} for seed in seeds]


def near_copy(seed: int, words: int = 30) -> Row:
    """A row with the last word changed: 25 of 27 runs of five words are common."""
    return {"text": f"{text_of(seed, words).rpartition(' ')[0]} other"}


def run(recipe: Recipe, folder: Path, run_tasks: RunTasks = run_in_process) -> Prepared:
    return prepare(recipe, Folder(str(folder / "prepared")), run_tasks)


def left(prepared: Prepared, split: str = "train") -> list[int]:
    """Numbers of the rows that are tokenised, ascending, once for each copy."""
    part = getattr(prepared.manifest, split)
    return sorted(
        number
        for file in part.files
        for numbers in pq.read_table(prepared.files.file(file))["rows"].to_pylist()
        for number in numbers
    )


def funnel(prepared: Prepared) -> list[tuple[str, int, int, dict[str, int]]]:
    return [
        (stage["stage"], stage["rows_in"], stage["rows_out"], stage["dropped"])
        for stage in prepared.manifest.funnel
    ]


@pytest.fixture
def make(make_recipe: MakeRecipe) -> MakeRecipe:
    def of_texts(**data: Any) -> Recipe:
        return make_recipe(**{"max_length": 512, "method": {"kind": "pretrain"}, **data})

    return of_texts


EVERY_STAGE: list[Any] = [
    "normalise",
    {"kind": "filter", "min_tokens": 8, "max_repetition": 0.5},
    "redact",
    {"kind": "deduplicate", "near": {}},
    "decontaminate",
]


def every_kind(folder: Path) -> dict[str, Any]:
    """Data of which each stage takes a row or more, on lines with a name."""
    rows = [
        *texts(1, 2, 3, 2),  # the last one is equal to the second
        near_copy(1),
        {"text": "tiny"},
        {"text": f"ada@mail.example {text_of(9)}"},
        {"text": "again and again and " * 10},
        {"text": "e\u0301\r\n" + text_of(10)},
    ]
    train = write_jsonl(folder / "a.jsonl", rows)
    return {"train": train, "eval": write_jsonl(folder / "e.jsonl", texts(3))}


def test_each_stage_counts_what_it_takes(tmp_path: Path, make: MakeRecipe) -> None:
    prepared = run(make(**every_kind(tmp_path), curate=EVERY_STAGE), tmp_path)
    assert left(prepared) == [0, 1, 6, 8]
    assert funnel(prepared) == [
        ("1 normalise", 9, 9, {}),
        ("2 filter", 9, 7, {"repeats itself": 1, "too short": 1}),
        ("3 redact", 7, 7, {}),
        (
            "4 deduplicate",
            7,
            5,
            {"equal to an earlier row": 1, "nearly equal to an earlier row": 1},
        ),
        ("5 decontaminate", 5, 4, {"shares words with evaluation data": 1}),
    ]
    manifest = prepared.manifest
    assert [stage["changed"] for stage in manifest.funnel] == [1, 0, 1, 0, 0]
    assert manifest.rows_read == 10 and manifest.dropped == {
        "filter: repeats itself": 1,
        "filter: too short": 1,
        "deduplicate: equal to an earlier row": 1,
        "deduplicate: nearly equal to an earlier row": 1,
        "decontaminate: shares words with evaluation data": 1,
    }
    places = [sample["place"].rpartition(":")[2] for sample in manifest.funnel[3]["samples"]]
    assert places == ["4", "5"]
    facts = dict(funnel_facts(manifest.funnel))
    before, after = mean_lengths(manifest.funnel[1])
    assert facts["2 filter, characters a row"] == f"{before:.0f} → {after:.0f}"
    assert facts["2 filter, for example"].startswith(f"{tmp_path}/a.jsonl:6: too short: ")
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_changed_rows_are_what_is_tokenised(
    tmp_path: Path, make: MakeRecipe, tokenizer: Any
) -> None:
    prepared = run(make(**every_kind(tmp_path), curate=EVERY_STAGE), tmp_path)
    ids = pq.read_table(prepared.files.file(prepared.manifest.train.files[0]))["input_ids"]
    written = tokenizer.decode([token for row in ids.to_pylist() for token in row])
    assert "[email]" in written and "ada@" not in written
    assert "é\nw" in written and "\r" not in written


class Watched:
    """Counts the tasks of each kind; fails at the first of one kind."""

    def __init__(self, fails_at: str = "") -> None:
        self.done: Counter[str] = Counter()
        self._fails_at = fails_at

    def __call__(self, task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            name = type(task).__name__
            if name == self._fails_at:
                raise KeyboardInterrupt
            self.done[name] += 1
            yield task(item)


def test_a_killed_preparation_goes_on_from_the_last_stage(tmp_path: Path, make: MakeRecipe) -> None:
    recipe = make(**every_kind(tmp_path), curate=EVERY_STAGE)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, Watched("MatchTask"))
    (deduplicate,) = (
        folder
        for folder in (tmp_path / "prepared" / "stages").iterdir()
        if not any(folder.iterdir())
    )
    left_over = [deduplicate / name for name in (".x.part", "work-x")]
    for path in left_over:
        path.touch()
        os.utime(path, (0, 0))
    again = Watched()
    killed = run(recipe, tmp_path, again)
    # the pass is that of decontaminate; those before deduplicate are not done again
    assert again.done["PassTask"] == 1 and again.done["SketchTask"] == 1
    assert not any(path.exists() for path in left_over)
    whole = run(recipe, tmp_path / "other")
    assert killed.manifest.funnel == whole.manifest.funnel
    assert killed.manifest.train.hashes == whole.manifest.train.hashes
    # Once at the first task of each kind.
    for kind in ("PassTask", *again.done):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "often", Watched(kind))
    often = run(recipe, tmp_path / "often")
    assert often.manifest.funnel == whole.manifest.funnel
    assert often.manifest.train.hashes == whole.manifest.train.hashes


@pytest.mark.parametrize(
    ("change", "passes", "sketches"),
    [
        ({"mix": {"temperature": 0.5}}, 0, 0),
        ({"max_length": 256}, 0, 0),
        ({"curate": [*EVERY_STAGE[:4], {"kind": "decontaminate", "ngram": 12}]}, 1, 0),
        ({"curate": [*EVERY_STAGE[:3], "deduplicate"]}, 0, 1),
        ({"curate": EVERY_STAGE[:2]}, 0, 0),
        ({"holdout": {"share": 0.5}, "eval": []}, 0, 1),
    ],
)
def test_another_setting_repeats_only_what_it_changes(
    tmp_path: Path, make: MakeRecipe, change: dict[str, Any], passes: int, sketches: int
) -> None:
    data = every_kind(tmp_path)
    stages = EVERY_STAGE[:4] if "holdout" in change else EVERY_STAGE
    first = make(**{**data, "curate": stages, "eval": change.get("eval", data["eval"])})
    changed = make(**{**data, "curate": stages, **change})
    run(first, tmp_path)
    assert fingerprint(first) != fingerprint(changed)
    watched = Watched()
    run(changed, tmp_path, watched)
    assert (watched.done["PassTask"], watched.done["SketchTask"]) == (passes, sketches)


def test_the_same_rows_for_any_number_of_tasks(
    tmp_path: Path, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for n in range(60) for row in (*texts(n, n), near_copy(n + 1))]
    random.Random(1).shuffle(rows)
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = make(train=data, curate=[{"kind": "deduplicate", "near": {}}], holdout={"share": 0.3})
    whole = run(recipe, tmp_path / "one")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    parts = run(recipe, tmp_path / "many")
    assert funnel(parts) == funnel(whole)
    assert funnel(whole)[1][2] == 61  # 60 texts, and the copy of one more
    for split in ("train", "eval"):
        assert left(parts, split) == left(whole, split)


def test_the_first_of_equal_rows_of_all_sources_stays(tmp_path: Path, make: MakeRecipe) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", texts(1, 2))
    second = write_jsonl(tmp_path / "b.jsonl", texts(2, 3, 1))
    both = [{"path": str(first)}, {"path": str(second), "weight": 2}]
    prepared = run(make(train=both, curate=["deduplicate"]), tmp_path)
    assert left(prepared) == [0, 1, 3, 3]
    assert [source.documents for source in prepared.manifest.sources] == [2, 2]


def test_rows_with_other_labels_are_not_equal(tmp_path: Path, make: MakeRecipe) -> None:
    answer = {"prompt": "one two three", "completion": text_of(1)}
    rows = [{**answer, "label": label} for label in (True, False, True)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    curate = [{"kind": "deduplicate", "near": {}}]
    prepared = run(make(train=data, curate=curate, method={"kind": "kto"}), tmp_path)
    assert left(prepared) == [0, 1]


def test_thousands_of_equal_rows_take_no_pairs(tmp_path: Path, make: MakeRecipe) -> None:
    row = json.dumps({"text": text_of(1)}) + "\n"
    data = tmp_path / "a.jsonl"
    data.write_text(row * 3_000 + json.dumps(near_copy(1)) + "\n", encoding="utf-8")
    prepared = run(make(train=data, curate=[{"kind": "deduplicate", "near": {}}]), tmp_path)
    taken = {"equal to an earlier row": 2_999, "nearly equal to an earlier row": 1}
    assert funnel(prepared)[-1] == ("2 deduplicate", 3_001, 1, taken)


def test_a_system_prompt_that_all_rows_share_does_not_make_them_alike(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    rows = [chat_row(f"question {n}", f"answer {n}") for n in range(4)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": text_of(1, 60)})
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    evals = write_jsonl(tmp_path / "e.jsonl", rows[:1])
    curate = [{"kind": "deduplicate", "near": {}}, "decontaminate"]
    prepared = run(make_recipe(train=data, eval=evals, curate=curate, max_length=999), tmp_path)
    assert left(prepared) == [1, 2, 3]


def test_evaluation_data_of_any_shape(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", texts(*range(5)))
    bench = [{"id": 7, "task": {"stem": text_of(2), "choices": ["a", text_of(4)]}}]
    against = str(write_jsonl(tmp_path / "bench.jsonl", bench))
    recipe = make(train=data, curate=[{"kind": "decontaminate", "against": against}])
    assert left(run(recipe, tmp_path)) == [0, 1, 3]


def test_the_template_of_evaluation_prompts_does_not_count(
    tmp_path: Path, make: MakeRecipe
) -> None:
    template = text_of(99)
    asked = [{"text": f"{template} {text_of(n, 15)}"} for n in range(12)]
    rows = [{"text": f"{template} {text_of(50)}"}, {"text": f"x {text_of(3, 15)} y"}]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    evals = write_jsonl(tmp_path / "e.jsonl", [*asked, *asked[:1] * 30])
    prepared = run(make(train=data, eval=evals, curate=["decontaminate"]), tmp_path)
    assert left(prepared) == [0]


def test_the_users_function_decides(tmp_path: Path, make: MakeRecipe) -> None:
    code = tmp_path / "rows.py"
    code.write_text(
        "def good(row):\n"
        "    if row['kind'] == 'odd':\n"
        "        return 'yes'\n"
        "    row['text'] = 'changes nothing'\n"
        "    return 1 / row['score'] > 0\n"
    )
    kinds = [("a", 1), ("a", -1), ("a", 0), ("odd", 1)]
    rows = [{**texts(n)[0], "kind": kind, "score": score} for n, (kind, score) in enumerate(kinds)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    keep = {"kind": "keep", "with": {"file": f"{code}:good", "source": code.read_text()}}
    prepared = run(make(train=data, curate=[keep], max_bad_rows=0.5), tmp_path)
    assert left(prepared) == [0]
    assert funnel(prepared) == [("1 keep", 4, 1, {"bad_row": 2, "good returns False": 1})]
    bad = [json.loads(line) for line in prepared.folder.read("quarantine.jsonl").splitlines()]
    assert [(row["line"], row["reason"]) for row in bad] == [
        (
            3,
            "keep good raises ZeroDivisionError: division by zero "
            f'(File "{code}", line 5, in good)',
        ),
        (4, "keep good returns str; expected True or False"),
    ]
    with pytest.raises(InputError, match=r"max_bad_rows allows 1\.0%, and 2 of 4 rows"):
        run(make(train=data, curate=[keep]), tmp_path / "strict")


def test_rows_of_a_group_are_on_one_side(tmp_path: Path, make: MakeRecipe) -> None:
    rows = [{**texts(n)[0], "user": f"u{n % 40}"} for n in range(200)]
    rows += [{**near_copy(n), "user": f"copy {n}"} for n in range(200)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = make(train=data, holdout={"share": 0.3, "group_by": "user"}, curate=["redact"])
    prepared = run(recipe, tmp_path)
    held = left(prepared, "eval")
    assert sorted(held + left(prepared)) == list(range(400))
    assert {n % 200 for n in held} == {n for n in held if n < 200}, "a copy is on the other side"
    assert not prepared.manifest.unused
    users = {rows[n]["user"] for n in held if n < 200}
    assert len(held) == 10 * len(users) and 5 <= len(users) <= 20


def test_a_group_is_the_same_in_all_kinds_of_files(tmp_path: Path, make: MakeRecipe) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{**texts(n)[0], "user": n % 40} for n in range(80)])
    numbers = [float(n % 40) for n in range(80)] + [math.nan]
    rows = [text_of(100 + n) for n in range(81)]
    pq.write_table(pa.table({"text": rows, "user": numbers}), tmp_path / "b.parquet")
    csv = "".join(f"{text_of(200 + n)},{n % 40}\n" for n in range(80))
    (tmp_path / "c.csv").write_text(f"text,user\n{csv}")
    sources = [str(lines), str(tmp_path / "b.parquet"), str(tmp_path / "c.csv")]
    recipe = make(train=sources, holdout={"share": 0.4, "group_by": "user"})
    prepared = run(recipe, tmp_path)
    assert prepared.manifest.dropped == {"bad_row": 1}, "the row whose number is missing"
    held = [row - (row > 160) for row in left(prepared, "eval")]
    users = {row % 80 % 40 for row in held}
    assert len(held) == 6 * len(users) and 5 <= len(users) <= 30


@pytest.mark.parametrize(
    "alike",
    [
        [7, 7.0, "7", "7.0", "7.00"],
        [-7, -7.0, "-7", "-7.0"],
        [0.5, "0.5"],
        [True, "true", "True"],
        ["7.1.0"],
        ["1.10"],
        ["u7"],
        [["a", 7]],
    ],
)
def test_a_group_is_the_same_in_any_spelling(alike: list[Any]) -> None:
    groups = {group_of("user", {"user": value}, {}) for value in alike}
    assert len(groups) == 1
    others = [8, False, "1.1", "7.1", "u7.0", ["a", 8]]
    assert not groups & {group_of("user", {"user": value}, {}) for value in others}


@pytest.mark.parametrize("value", [None, math.nan, ""])
def test_a_missing_value_is_no_group(value: Any) -> None:
    assert group_of("user", {"user": value}, {"user": 7}) == '"7"', "that of the source's map"
    with pytest.raises(RowError, match="there is no value in the column user"):
        group_of("user", {"user": value}, {"user": value})


def test_a_group_of_any_value_that_functions_make() -> None:
    rows = ({"user": {1: "a", "b": None, None: [2]}}, {"user": {"b": None, None: [2], 1: "a"}})
    assert len({group_of("user", {}, row) for row in rows}) == 1
    for value in ({(1, 2): 3}, 10**5000):
        with pytest.raises(RowError, match=r"the column user, .* holds no value of JSON: "):
            group_of("user", {}, {"user": value})


def test_other_groups_of_the_same_rows_leave_ungrouped_rows_as_they_are(
    tmp_path: Path, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{**texts(1)[0], "user": 1}])
    holdouts = [0.5, {"share": 0.5}, {"share": 0.5, "group_by": "user"}]
    recipes = [make(train=data, curate=["normalise"], holdout=each) for each in holdouts]
    before = [fingerprint(recipe) for recipe in recipes]
    monkeypatch.setattr(plan, "_GROUP_VERSION", 0)
    after = [fingerprint(recipe) for recipe in recipes]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False]


def test_a_single_group_is_on_one_side(tmp_path: Path, make: MakeRecipe) -> None:
    """All rows are held out, or none, whatever the share."""
    data = write_jsonl(tmp_path / "a.jsonl", [{**text, "user": "u"} for text in texts(1, 2, 3)])
    for share, left in ((0.001, "evaluate"), (0.999, "train")):
        recipe = make(train=data, holdout={"share": share, "group_by": "user"})
        with pytest.raises(InputError, match=rf"is left to {left} on: .* many groups are needed"):
            run(recipe, tmp_path)


def test_a_row_without_the_groups_column_is_named(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", texts(1, 2))
    recipe = make(train=data, holdout={"share": 0.5, "group_by": "user"})
    reason = (
        "there is no column user, which data.holdout.group_by names; map of the source may make it"
    )
    with pytest.raises(InputError, match=re.escape(f"a.jsonl:1: {reason}")):
        run(recipe, tmp_path)
    (first, _) = show_rows(recipe, 9, Folder(str(tmp_path / "prepared"))).rows
    assert first.problem == f"not usable: {reason}"
    lenient = make(train=data, holdout={"share": 0.5, "group_by": "user"}, max_bad_rows=1.0)
    message = rf"read leaves no row(.|\n)*for example:\n    .*a\.jsonl:1: {re.escape(reason)}"
    with pytest.raises(InputError, match=message):
        run(lenient, tmp_path)


def test_temperature_mixes_sources(tmp_path: Path, make: MakeRecipe) -> None:
    large = write_jsonl(tmp_path / "a.jsonl", texts(*range(900), *range(100)))
    small = write_jsonl(tmp_path / "b.jsonl", texts(*range(1000, 1100)))
    both = [{"path": str(large)}, {"path": str(small)}]
    for temperature, share in ((1, 0.1), (0.5, 0.25), (0, 0.5)):
        recipe = make(train=both, mix={"temperature": temperature}, curate=["deduplicate"])
        documents = [source.documents for source in run(recipe, tmp_path).manifest.sources]
        assert documents[1] / sum(documents) == pytest.approx(share, abs=0.02)
        assert sum(documents) == pytest.approx(1000, abs=30)
        report = report_of(recipe, Folder(str(tmp_path / "prepared")), run_in_process, SILENT)
        assert [source["left"] for source in report["sources"]] == [900, 100]
        assert report["sources"][1]["share"] == pytest.approx(share, abs=1e-4)


def test_rows_are_shown_with_the_stage_that_drops_them(tmp_path: Path, make: MakeRecipe) -> None:
    recipe = make(**every_kind(tmp_path), curate=EVERY_STAGE)
    folder = Folder(str(tmp_path / "prepared"))
    before = show_rows(recipe, 9, folder).rows
    assert before[5].problem == "dropped by 2 filter: too short"
    assert before[4].facts[-1] == "4 deduplicate not done yet: finray data report"
    report_of(recipe, folder, run_in_process, SILENT)
    after = show_rows(recipe, 9, folder).rows
    problems = [row.problem.partition(":")[0] for row in after]
    taken = [f"dropped by {stage}" for stage in ("5 decontaminate", *["4 deduplicate"] * 2)]
    assert problems == ["", "", *taken, *["dropped by 2 filter"], "", "dropped by 2 filter", "", ""]
    assert after[6].facts[-1] == "changed by 3 redact"


# ---- what is refused, or quarantined ------------------------------------------------------------


def test_a_stage_that_drops_everything(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", texts(1, 1, 2))
    recipe = make(train=data, curate=["deduplicate", {"kind": "filter", "min_tokens": 9999}])
    with pytest.raises(InputError) as refused:
        run(recipe, tmp_path)
    assert str(refused.value) == (
        "data.curate.1: filter leaves no row to train on; change it, or add data. What each stage "
        "dropped:\n"
        "  1 read: 3 → 3 rows\n"
        "  2 deduplicate: 3 → 2 rows (equal to an earlier row 1)\n"
        "  3 filter: 2 → 0 rows (too short 2)"
    )


def test_an_evaluation_set_wholly_inside_the_training_set(tmp_path: Path, make: MakeRecipe) -> None:
    short = [{"text": "one two"}, {"text": "three"}]
    data = write_jsonl(tmp_path / "a.jsonl", [*texts(1, 2), *short, *texts(3)])
    evals = write_jsonl(tmp_path / "e.jsonl", [*texts(1, 2), *short])
    prepared = run(make(train=data, eval=evals, curate=["decontaminate"]), tmp_path)
    assert left(prepared) == [4] and prepared.manifest.in_train_too == 0
    write_jsonl(tmp_path / "a.jsonl", texts(1, 2))
    with pytest.raises(InputError, match=r"^data\.curate\.0: decontaminate leaves no row"):
        run(make(train=data, eval=evals, curate=["decontaminate"]), tmp_path)


def test_unusable_rows_are_counted_once_with_their_lines(tmp_path: Path, make: MakeRecipe) -> None:
    good = [json.dumps(row).encode() for row in texts(*range(20))]
    lines = [
        *good[:3],
        b'{"text": "\xff"}',
        b"\0\0\0",
        b'{"text": "a\\u0000b c"}',
        b"{oops",
        *good[3:],
    ]
    data = tmp_path / "a.jsonl"
    data.write_bytes(b"\n".join(lines) + b"\n")
    prepared = run(
        make(train=data, curate=["normalise", "deduplicate"], max_bad_rows=0.2), tmp_path
    )
    assert prepared.manifest.dropped == {"bad_row": 3} and prepared.manifest.rows_read == 24
    bad = [json.loads(line) for line in prepared.folder.read("quarantine.jsonl").splitlines()]
    assert [row["line"] for row in bad] == [4, 5, 7]
    assert left(prepared) == [0, 1, 2, 5, *range(7, 24)]
    with pytest.raises(InputError, match=r"a\.jsonl:4: not UTF-8 text at byte 11 of the line"):
        run(make(train=data, curate=["normalise"]), tmp_path / "strict")


def test_a_truncated_archive(tmp_path: Path, make: MakeRecipe) -> None:
    import gzip

    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in texts(*range(900))).encode())
    data = tmp_path / "a.jsonl.gz"
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: the file is damaged or cannot be read"):
        run(make(train=data, curate=["deduplicate"]), tmp_path)
    assert not list((tmp_path / "prepared").rglob("*.part"))


def test_a_parquet_file_with_another_schema_among_many(tmp_path: Path, make: MakeRecipe) -> None:
    import pyarrow as pa

    (tmp_path / "data").mkdir()
    for number in range(4):
        column = "text" if number != 2 else "body"
        table = pa.table({column: [text_of(10 * number + n) for n in range(10)]})
        pq.write_table(table, tmp_path / "data" / f"{number}.parquet")
    recipe = make(train=str(tmp_path / "data"), curate=["deduplicate"], max_bad_rows=0.3)
    prepared = run(recipe, tmp_path)
    assert left(prepared) == [*range(20), *range(30, 40)]
    bad = [json.loads(line) for line in prepared.folder.read("quarantine.jsonl").splitlines()]
    assert bad[0]["file"].endswith("2.parquet") and len(bad) == 10


def test_a_file_that_vanishes_while_it_is_read(tmp_path: Path, make: MakeRecipe) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", texts(1, 2))
    second = write_jsonl(tmp_path / "b.jsonl", texts(3))

    def vanish(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            yield task(item)
            second.unlink(missing_ok=True)

    recipe = make(train=[{"path": str(first)}, {"path": str(second)}], curate=["normalise"])
    with pytest.raises(InputError, match=r"b\.jsonl: the file is damaged or cannot be read: "):
        run(recipe, tmp_path, vanish)


def test_a_full_disk(tmp_path: Path, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = make(train=write_jsonl(tmp_path / "a.jsonl", texts(1, 2)), curate=["normalise"])
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(RunError, match=r"cannot write the prepared data: .*No space left"):
            run(recipe, tmp_path)
    assert left(run(recipe, tmp_path)) == [0, 1]


def test_a_damaged_file_of_a_stage_is_made_again(tmp_path: Path, make: MakeRecipe) -> None:
    recipe = make(train=write_jsonl(tmp_path / "a.jsonl", texts(*range(50))), curate=["normalise"])
    run(recipe, tmp_path)
    (file,) = (tmp_path / "prepared" / "stages").rglob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(bytes(content))
    longer = make(train=tmp_path / "a.jsonl", curate=["normalise"], max_length=256)
    with pytest.raises(
        RunError, match=r"000000\.parquet: this file of a curation stage is .*again"
    ):
        run(longer, tmp_path)
    assert left(run(longer, tmp_path)) == list(range(50))


def test_a_redacted_row_that_the_method_cannot_use_is_counted(
    tmp_path: Path, make: MakeRecipe
) -> None:
    answer = {"prompt": "mail?", "chosen": "ada@mail.example", "rejected": "bob@mail.example"}
    good = {"prompt": "mail?", "chosen": "ada@mail.example", "rejected": "no"}
    data = write_jsonl(tmp_path / "a.jsonl", [answer, good])
    prepared = run(make(train=data, curate=["redact"], method={"kind": "dpo"}), tmp_path)
    assert funnel(prepared) == [("1 redact", 2, 1, {"not usable after it": 1})]
    assert left(prepared) == [1]


def test_what_redact_drops_is_shown_nowhere(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "ada@mail.example"}, *texts(1)])
    curate = [{"kind": "redact", "of": ["email"], "drop": True}]
    prepared = run(make(train=data, curate=curate), tmp_path)
    assert funnel(prepared) == [("1 redact", 2, 1, {"holds email": 1})]
    assert b"mail.example" not in prepared.manifest.to_json()


@pytest.mark.parametrize(
    "first",
    [
        {"kind": "filter", "min_tokens": 60},
        {
            "kind": "score",
            "with": {"file": "/f.py:f", "source": "def f(row): return len(row['text'])"},
            "min": 60,
        },
    ],
)
def test_what_is_shown_of_a_stage_before_redact_is_masked(
    tmp_path: Path, make: MakeRecipe, first: dict[str, Any]
) -> None:
    row = {"text": f"to\n{PHONE}", "from": PHONE}
    data = write_jsonl(tmp_path / "a.jsonl", [row, *texts(1)])
    plain = run(make(train=data, curate=[first]), tmp_path)
    assert PHONE in plain.manifest.funnel[-1]["samples"][0]["text"]
    # The same files of the same stage.
    masked = run(make(train=data, curate=[first, "redact"]), tmp_path).manifest
    assert PHONE.encode() not in masked.to_json() and b"[phone]" in masked.to_json()


def test_a_recipe_without_stages_has_no_report(tmp_path: Path, make: MakeRecipe) -> None:
    recipe = make(train=write_jsonl(tmp_path / "a.jsonl", texts(1)))
    with pytest.raises(InputError, match=r"^data\.curate: the recipe has no stages; add some"):
        report_of(recipe, Folder(str(tmp_path)), run_in_process, SILENT)
