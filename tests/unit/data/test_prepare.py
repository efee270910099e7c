"""Preparing from end to end, without Ray: content, counts, crashes and races."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.recorded import RecordedProgress

from finray.training.common.errors import InputError
from finray.training.common.progress import Progress
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.prepare import prepare
from finray.training.data.prepared import (
    ROW_GROUP,
    SEQUENCE_SCHEMA,
    Manifest,
    Prepared,
    Split,
    open_prepared,
)
from finray.training.data.tasks import run_in_process

from .conftest import MakeRecipe, chat_row, write_jsonl

Row = dict[str, Any]


def refuse(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    raise AssertionError("no task should run")


def run(recipe: Recipe, folder: Path) -> Prepared:
    return prepare(recipe, Folder(str(folder / "prepared")), run_in_process)


def sequences(prepared: Prepared, split: Split | None) -> list[Row]:
    assert split is not None
    rows: list[Row] = []
    for file, sizes in zip(split.files, split.row_groups, strict=True):
        parquet = pq.ParquetFile(prepared.files.file(file))
        assert parquet.schema_arrow.equals(SEQUENCE_SCHEMA)
        groups = range(parquet.num_row_groups)
        assert tuple(parquet.metadata.row_group(g).num_rows for g in groups) == sizes
        rows += parquet.read().to_pylist()
    return rows


def documents(prepared: Prepared, split: Split | None) -> list[tuple[int, list[int], list[bool]]]:
    """(row, ids, mask) of every document, sorted by row."""
    collected = []
    for sequence in sequences(prepared, split):
        start = 0
        for length, row in zip(sequence["lengths"], sequence["rows"], strict=True):
            part = slice(start, start + length)
            collected.append((row, sequence["input_ids"][part], sequence["trainable"][part]))
            start += length
        assert start == len(sequence["input_ids"]) == len(sequence["trainable"])
    return sorted(collected)


def rows_of(prepared: Prepared, split: Split | None) -> list[int]:
    return [row for row, _, _ in documents(prepared, split)]


def chats(count: int) -> list[Row]:
    return [chat_row(f"one two {n}", f"three {n} " * (1 + n % 5)) for n in range(count)]


def test_every_row_once_and_counts_that_add_up(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any
) -> None:
    rows = chats(500)
    progress = RecordedProgress()
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", rows), max_length=512)
    folder = Folder(str(tmp_path / "prepared"))
    prepared = prepare(recipe, folder, run_in_process, progress)
    written = documents(prepared, prepared.manifest.train)
    assert [row for row, _, _ in written] == list(range(500))
    for row, ids, mask in written:
        answer = tokenizer.decode(np.array(ids)[np.array(mask)])
        assert answer == rows[row]["messages"][1]["content"] + "<|im_end|>\n"
    manifest = prepared.manifest
    split = manifest.train
    packed = sequences(prepared, split)
    assert split.sequences == len(packed)
    assert split.documents == 500
    assert split.tokens == sum(len(ids) for _, ids, _ in written)
    assert split.trainable_tokens == sum(sum(mask) for _, _, mask in written)
    assert split.fill > 0.9
    assert max(len(sequence["input_ids"]) for sequence in packed) <= split.capacity == 512
    assert max(map(max, split.row_groups)) <= ROW_GROUP
    assert (manifest.rows_read, manifest.dropped, manifest.eval) == (500, {}, None)
    assert sum(manifest.length_histogram.counts) == 500
    assert len(manifest.length_histogram.edges) == len(manifest.length_histogram.counts) + 1
    assert progress.statuses == [
        f"preparing data: {phase} 1/1, {split.tokens:,} tokens" for phase in ("tokenise", "pack")
    ]
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.dumps(manifest.summary()).count("fill") == 1


def test_without_packing_a_document_is_a_sequence(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(200)), packing=False)
    prepared = run(recipe, tmp_path)
    order = [sequence["rows"] for sequence in sequences(prepared, prepared.manifest.train)]
    assert sorted(order) == [[n] for n in range(200)]
    assert order != sorted(order)  # shuffled, so that a row group is a random part


def test_second_call_does_no_work(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    first = run(recipe, tmp_path)
    again = prepare(recipe, Folder(str(tmp_path / "prepared")), refuse)
    assert again == first


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(300)), holdout=0.2)
    first, second = run(recipe, tmp_path / "1"), run(recipe, tmp_path / "2")
    assert sequences(first, first.manifest.train) == sequences(second, second.manifest.train)
    assert first.samples(9) == second.samples(9)


def test_token_files_are_deleted(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)), holdout=0.3)
    prepared = run(recipe, tmp_path)
    assert prepared.folder.names() == sorted([prepared.manifest.attempt, "manifest.json"])
    assert prepared.files.names() == ["eval", "samples.parquet", "train"]


def test_holdout_is_disjoint_stable_and_keeps_copies_together(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    rows = chats(200) * 2
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = run(make_recipe(train=path, holdout=0.25), tmp_path)
    train = rows_of(prepared, prepared.manifest.train)
    held = rows_of(prepared, prepared.manifest.eval)
    assert sorted(train + held) == list(range(400))
    assert 0.15 < len(held) / 400 < 0.35
    assert {row % 200 for row in held}.isdisjoint(row % 200 for row in train)
    longer = run(make_recipe(train=path, holdout=0.25, max_length=100), tmp_path)
    assert rows_of(longer, longer.manifest.eval) == held


def test_samples_are_held_out_prompts(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any
) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", chats(5))
    held = write_jsonl(tmp_path / "b.jsonl", [chat_row(f"q {n}", f"a {n}") for n in range(1100)])
    prepared = run(make_recipe(train=train, eval=held), tmp_path)
    samples = prepared.samples(10_000)
    assert prepared.manifest.samples == len(samples) == 1000
    assert [sample.row for sample in samples] == list(range(1000))
    assert samples[7].reference == "a 7"
    assert samples[7].prompt == tokenizer.decode(samples[7].prompt_ids)
    assert prepared.samples(2) == samples[:2]


def test_weights(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", chats(400)) for n in range(3)]
    weights = (2.0, 0.5, 1.25)
    sources = [
        {"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)
    ]
    prepared = run(make_recipe(train=sources), tmp_path)
    rows = np.array(rows_of(prepared, prepared.manifest.train))
    counts = np.bincount(rows, minlength=1200).reshape(3, 400)
    assert set(counts[0]) == {2}
    assert set(counts[1]) == {0, 1}
    assert set(counts[2]) == {1, 2}
    assert counts.mean(axis=1) == pytest.approx(weights, abs=0.1)
    assert [source.rows for source in prepared.manifest.sources] == [400, 400, 400]


def test_rows_are_numbered_over_files_and_sources(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "x").mkdir()
    write_jsonl(tmp_path / "x/a.jsonl", chats(3))
    write_jsonl(tmp_path / "x/b.jsonl", chats(4))
    (tmp_path / "c.json").write_text(json.dumps([{"text": "one two"}] * 2))
    sources = [{"path": str(tmp_path / name)} for name in ("x", "c.json")]
    prepared = run(make_recipe(train=sources), tmp_path)
    assert rows_of(prepared, prepared.manifest.train) == list(range(9))
    sources_read = [
        (source.format, source.files, source.rows) for source in prepared.manifest.sources
    ]
    assert sources_read == [("messages", 2, 7), ("text", 1, 2)]


def test_bad_rows_go_to_quarantine_with_their_lines(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(chats(1)[0])
    huge = "x" * 2_500_000  # longer than half a chunk: lines straddle the chunks' borders
    path.write_text("\n".join([good, huge, good, "", huge, huge, good, '{"messages": null}', good]))
    prepared = run(make_recipe(train=path, max_bad_rows=1.0), tmp_path)
    assert prepared.manifest.dropped == {"bad_row": 4}
    assert prepared.manifest.rows_read == 8
    assert rows_of(prepared, prepared.manifest.train) == [0, 2, 5, 7]
    lines = prepared.folder.read("quarantine.jsonl").splitlines()
    places = [(row["file"], row["line"]) for row in map(json.loads, lines)]
    assert places == [(str(path), line) for line in (2, 5, 6, 8)]
    last = json.loads(lines[-1])
    assert last["reason"] == "messages is null; expected a list of messages"
    assert last["row"] == '{"messages": null}'


def test_too_many_bad_rows_are_an_error(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(10), *[{"messages": []}] * 5])
    with pytest.raises(InputError) as caught:
        run(make_recipe(train=path, max_bad_rows=0.3), tmp_path)
    message = str(caught.value)
    assert "5 of 15 rows (33.3%)" in message
    assert "allows 30.0%" in message
    assert f"{path}:11: messages is an empty list" in message
    assert f"{path}:13: " in message
    assert f"{path}:14: " not in message
    quarantine = Path(message.rsplit(": ", 1)[1])
    assert len(quarantine.read_text().splitlines()) == 5
    assert [path.name for path in quarantine.parent.iterdir()] == ["quarantine.jsonl"]
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))


def test_a_stricter_limit_holds_for_data_prepared_before(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(10), {"messages": []}])
    run(make_recipe(train=path, max_bad_rows=0.5), tmp_path)
    with pytest.raises(InputError, match=r"(?s)1 of 11 rows .*a\.jsonl:11: "):
        run(make_recipe(train=path, max_bad_rows=0.01), tmp_path)


def test_no_sequence_left_is_an_error(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat_row("one", "two " * 99)] * 3)
    with pytest.raises(InputError) as caught:
        run(make_recipe(train=path), tmp_path)
    message = (
        "no sequence is left to train on: 3 rows read, dropped: overlong 3 (data.max_length is 64)"
        "; raise data.max_length, or add data"
    )
    assert message in str(caught.value)
    home = next((tmp_path / "prepared").iterdir())
    assert list(home.iterdir()) == []


def test_an_empty_holdout_is_an_error(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chats(4))
    with pytest.raises(InputError, match=r"data\.holdout 0\.0001: no sequence is left to evaluate"):
        run(make_recipe(train=path, holdout=0.0001), tmp_path)


def test_unstable_template_names_its_row(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    template = "{% for m in messages %}{{ loop.revindex ~ m['content'] }}{% endfor %}"
    path = tmp_path / "a.jsonl"
    huge = json.dumps({"messages": "x" * 4_200_000})
    path.write_text("\n".join([huge, "", json.dumps(chats(1)[0])]))
    recipe = make_recipe(train=path, chat_template=template, max_bad_rows=1.0)
    with pytest.raises(InputError, match=r"a\.jsonl:3: the chat template rewrites earlier turns"):
        run(recipe, tmp_path)


class Killed(BaseException):
    """Ends the process; no handler of ordinary exceptions runs."""


def test_a_killed_attempt_is_not_used(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    key = run(recipe, tmp_path / "other").manifest.fingerprint
    home = tmp_path / "prepared" / key
    for name in ("fresh", "stale"):
        (home / name / "train").mkdir(parents=True)
        (home / name / "train" / "000000.parquet").write_bytes(b"half a file")
    day_ago = time.time() - 25 * 3600
    for path in (home / "stale").rglob("*"):
        os.utime(path, (day_ago, day_ago))
    assert open_prepared(Folder(str(home))) is None
    prepared = run(recipe, tmp_path)
    assert rows_of(prepared, prepared.manifest.train) == list(range(20))
    assert prepared.folder.names() == sorted([prepared.manifest.attempt, "fresh", "manifest.json"])


def test_an_interrupted_attempt_cleans_up(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))

    class Interrupt(Progress):
        def status(self, text: str) -> None:
            if " pack " in text:
                raise Killed

    folder = Folder(str(tmp_path / "prepared"))
    with pytest.raises(Killed):
        prepare(recipe, folder, run_in_process, Interrupt())
    assert [(folder / name).names() for name in folder.names()] == [[]]


def test_two_concurrent_preparations_keep_one_result(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(50)))
    folder = Folder(str(tmp_path / "prepared"))
    barrier = threading.Barrier(2)
    results: list[Prepared] = []

    class Wait(Progress):
        def status(self, text: str) -> None:
            if " pack " in text:
                barrier.wait(60)

    def work() -> None:
        results.append(prepare(recipe, folder, run_in_process, Wait()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert results[0].folder.names() == sorted([results[0].manifest.attempt, "manifest.json"])
    assert rows_of(results[0], results[0].manifest.train) == list(range(50))


def test_damaged_prepared_data_is_an_error(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    prepared = run(recipe, tmp_path)
    prepared.files.delete(prepared.manifest.train.files[0])
    with pytest.raises(
        InputError, match=r"train/000000\.parquet: this file of the prepared data is missing"
    ):
        run(recipe, tmp_path)
    prepared.folder.write("manifest.json", b"{")
    with pytest.raises(InputError, match=r"manifest\.json: damaged .*; delete "):
        run(recipe, tmp_path)


def test_pretraining_on_text(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    texts = [{"text": "one two three " * n} for n in range(1, 60)]
    recipe = make_recipe(
        train=write_jsonl(tmp_path / "a.jsonl", texts), method={"kind": "pretrain"}, holdout=0.1
    )
    prepared = run(recipe, tmp_path)
    split = prepared.manifest.train
    assert split.trainable_tokens == split.tokens - split.documents
    assert prepared.manifest.samples == 0
    written = documents(prepared, split) + documents(prepared, prepared.manifest.eval)
    assert {row for row, _, _ in written} == set(range(59))
    assert split.documents > 59
