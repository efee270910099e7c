"""Preparing from end to end, without Ray: content, counts, crashes and races."""

import errno
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

from finray.cluster.cli.prepare import render_data
from finray.training.common.errors import InputError, RunError
from finray.training.common.progress import Progress
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data import prepared as data_files
from finray.training.data.fingerprint import fingerprint
from finray.training.data.prepare import find_prepared, prepare
from finray.training.data.prepared import (
    ROW_GROUP,
    SEQUENCE_SCHEMA,
    DamagedDataError,
    Manifest,
    Prepared,
    Split,
    open_prepared,
    remarks,
)
from finray.training.data.row_facts import describe_lengths
from finray.training.data.sample import measure_sample
from finray.training.data.stream import every_sequence
from finray.training.data.tasks import run_in_process
from finray.training.records.report import data_statistics

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
    assert prepared.manifest.dropped == {"by_weight": (counts == 0).sum()}


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


def test_a_weight_that_takes_no_row_is_an_error(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chats(4))
    recipe = make_recipe(train=[{"path": str(path), "weight": 1e-9}])
    with pytest.raises(
        InputError, match=r"4 rows read, dropped: by_weight 4; raise the weight of a source"
    ):
        run(recipe, tmp_path)


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
    with pytest.raises(InputError, match=r"a\.jsonl:3: the chat template.* cannot be separated"):
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


def flip(path: Path, place: float) -> None:
    """Change one bit of a file, at a place between 0 and 1."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


def read_all(prepared: Prepared) -> list[Row]:
    """The training sequences, as a worker reads them."""
    split = prepared.manifest.train
    return [
        {"ids": row.input_ids.tolist(), "mask": row.trainable.tolist(), "rows": row.rows.tolist()}
        for row in every_sequence(prepared.files, split, 0, 1)
    ]


@pytest.mark.parametrize("place", [0.0, 0.01, 0.2, 0.5, 0.8, 0.95, 0.999])
def test_a_changed_bit_is_named_and_the_data_prepared_again(
    tmp_path: Path, make_recipe: MakeRecipe, place: float
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(300)))
    prepared = run(recipe, tmp_path)
    expected = read_all(run(recipe, tmp_path / "other"))
    damaged = Path(prepared.files.file(prepared.manifest.train.files[0]))
    flip(damaged, place)
    with pytest.raises(DamagedDataError, match=f"{damaged}: damaged: this file"):
        read_all(prepared)
    progress = RecordedProgress()
    again = prepare(recipe, Folder(str(tmp_path / "prepared")), run_in_process, progress)
    assert progress.statuses[0] == (
        f"{damaged}: this file of the prepared data is missing; preparing the data again"
    )
    assert read_all(again) == expected
    assert run(recipe, tmp_path) == again


def test_changed_samples_are_named(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(40)), holdout=0.5)
    prepared = run(recipe, tmp_path)
    expected = prepared.samples(9)
    other = run(recipe, tmp_path / "other")
    flip(Path(other.files.file("samples.parquet")), 0.3)
    with pytest.raises(DamagedDataError, match=r"samples\.parquet: damaged"):
        other.samples(9)
    assert run(recipe, tmp_path / "other").samples(9) == expected


def test_a_file_is_read_for_its_hash_once(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(300)), packing=False)
    prepared = run(recipe, tmp_path)
    assert len(prepared.manifest.train.row_groups[0]) > 2
    hashed: list[str] = []
    original = data_files._hash_of_file
    monkeypatch.setattr(
        data_files, "_hash_of_file", lambda *at: hashed.append(at[1]) or original(*at)
    )
    assert read_all(prepared) == read_all(prepared)
    assert set(hashed) == {"train/000000.parquet"}
    assert len(hashed) <= 2


@pytest.mark.parametrize(
    "missing", ["train/000000.parquet", "eval/000000.parquet", "samples.parquet"]
)
def test_a_missing_file_is_prepared_again(
    tmp_path: Path, make_recipe: MakeRecipe, missing: str
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(40)), holdout=0.3)
    prepared = run(recipe, tmp_path)
    prepared.files.delete(missing)
    with pytest.raises(DamagedDataError, match=f"{missing}: this file of the prepared data is m"):
        open_prepared(prepared.folder)
    assert run(recipe, tmp_path).files.exists(missing)


def with_digit_changed(manifest: bytes) -> bytes:
    return manifest.replace(b'"sequences": ', b'"sequences": 1', 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: b"",
        lambda manifest: b"{",
        lambda manifest: manifest[:-200],
        lambda manifest: b"\xff\x00" + manifest,
        lambda manifest: b"[1]",
        lambda manifest: b"null",
        lambda manifest: b"[" * 200_000,
        lambda manifest: b'{"train": 3}',
        lambda manifest: manifest.replace(b'"files": [', b'"files": 3, "x": ['),
        with_digit_changed,
    ],
)
def test_a_damaged_manifest_is_named_and_the_data_prepared_again(
    tmp_path: Path, make_recipe: MakeRecipe, damage: Callable[[bytes], bytes]
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    prepared = run(recipe, tmp_path)
    content = prepared.folder.read("manifest.json")
    prepared.folder.write("manifest.json", damage(content))
    assert prepared.folder.read("manifest.json") != content
    progress = RecordedProgress()
    again = prepare(recipe, Folder(str(tmp_path / "prepared")), run_in_process, progress)
    assert progress.statuses[0].startswith(f"{prepared.folder}/manifest.json: damaged (")
    assert rows_of(again, again.manifest.train) == list(range(20))
    assert prepare(recipe, Folder(str(tmp_path / "prepared")), refuse) == again


def test_a_manifest_without_hashes_is_prepared_again(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    prepared = run(recipe, tmp_path)
    values = json.loads(prepared.folder.read("manifest.json"))
    del values["digest"], values["train"]["hashes"]
    prepared.folder.write("manifest.json", json.dumps(values).encode())
    assert run(recipe, tmp_path).manifest.train.hashes


@pytest.mark.parametrize("part", ["tokens", "train", "manifest"])
def test_a_full_disk_ends_with_one_message(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Nothing is taken as prepared, and the next start has room."""
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    folder = Folder(str(tmp_path / "prepared"))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        if part == "tokens":
            full.setattr(pq.ParquetWriter, "write_table", fail)
        elif part == "train":
            full.setattr("finray.training.data.assembling.write_hashed", fail)
        else:
            full.setattr(os, "link", fail)
        with pytest.raises(RunError) as caught:
            prepare(recipe, folder, run_in_process)
    assert str(caught.value) == (
        f"{folder}: cannot write the prepared data: [Errno 28] No space left on device; make room "
        "or allow writing there, or set storage to another folder"
    )
    assert not list(Path(folder.path).rglob("*.parquet")) or part == "manifest"
    assert find_prepared(recipe, folder) is None
    prepared = prepare(recipe, folder, run_in_process)
    assert rows_of(prepared, prepared.manifest.train) == list(range(20))


@pytest.mark.parametrize("name", ["prepared", "prepared/{key}", "prepared/{key}/manifest.json"])
def test_a_file_or_a_folder_in_the_wrong_place(
    tmp_path: Path, make_recipe: MakeRecipe, name: str
) -> None:
    recipe = make_recipe(train=write_jsonl(tmp_path / "a.jsonl", chats(20)))
    path = tmp_path / name.format(key=fingerprint(recipe))
    if path.suffix:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a file")
    with pytest.raises(InputError, match=r"cannot read the prepared data: .*set storage to"):
        run(recipe, tmp_path)
    with pytest.raises(InputError, match="cannot read the prepared data"):
        find_prepared(recipe, Folder(str(tmp_path / "prepared")))


def test_a_damaged_quarantine_still_ends_with_a_message(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(10), {"messages": []}])
    prepared = run(make_recipe(train=path, max_bad_rows=0.5), tmp_path)
    for content in (b"{", b"3\n", b"\xff", None):
        prepared.folder.delete("quarantine.jsonl")
        if content is not None:
            prepared.folder.write("quarantine.jsonl", content)
        with pytest.raises(InputError, match=r"1 of 11 rows .*(?s:.*)the list is damaged"):
            run(make_recipe(train=path), tmp_path)


def test_notes_are_counted(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    path = write_jsonl(tmp_path / "a.jsonl", chats(20))
    prepared = run(make_recipe(train=path, chat_template=plain), tmp_path)
    assert prepared.manifest.notes == prepared.manifest.summary()["notes"] == {"no_end_trained": 20}
    (text,) = remarks({"notes": {"no_end_trained": 20}})
    assert text.startswith("20 answers whose end is not trained")
    assert f"  note        {text}" in render_data(prepared.manifest.summary()).splitlines()
    report = {"rows_read": 20, "notes": prepared.manifest.notes}
    assert ("Note", text) in dict(data_statistics({"data": report}))["Rows"]


def test_a_prompt_of_an_online_method_keeps_its_space_for_the_answer(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any
) -> None:
    rows = [{"prompt": "the model: ", "reference": "mine"}, {"prompt": "the model:"}]
    method = {"kind": "grpo", "rewards": [{"file": "/r.py:f", "source": ""}]}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = run(make_recipe(train=path, method=method, max_length=600), tmp_path)
    stored = {row["rows"][0]: row for row in sequences(prepared, prepared.manifest.train)}
    assert stored[0]["input_ids"] == stored[1]["input_ids"]
    assert tokenizer.decode(stored[0]["input_ids"]) == "<|bos|>the model:"
    assert json.loads(stored[0]["extra"]) == {
        "prompt": "the model: ",
        "columns": {"reference": "mine"},
        "cut": " ",
    }
    assert "cut" not in json.loads(stored[1]["extra"])


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


def test_what_is_said_of_rows(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    """Unused fields, lengths, and held-out rows that are trained on, against a plain count."""
    rows = [chat_row(f"q {n} " + "word " * n, "a") for n in range(40)]
    for row in rows[:7]:
        row["topic"] = "x"
        row["messages"][0]["date"] = "2026-01-31"
    held_out = [*rows[3:8], chat_row("other", "a")]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    evaluated = write_jsonl(tmp_path / "eval.jsonl", held_out)
    recipe = make_recipe(train=train, eval=evaluated, max_length=48)
    prepared = run(recipe, tmp_path)
    sizes = sorted(
        len(tokenizer.apply_chat_template(row["messages"], return_dict=False))
        for row in (*rows, *held_out)
    )
    kept = [size for size in sizes if size <= 48]
    manifest = prepared.manifest
    assert manifest.dropped == {"overlong": len(sizes) - len(kept)} and len(kept) < len(sizes)
    places = {"0.5": 23, "0.9": 42, "0.99": 46, "1": 46}
    assert manifest.length_quantiles == {
        share: sizes[place - 1] if sizes[place - 1] <= 48 else None
        for share, place in places.items()
    }
    assert manifest.in_train_too == 5
    assert manifest.unused == {"topic": 11, "messages[].date": 11}
    text = "5 held-out rows are in the training data, too"
    assert remarks(manifest.summary())[0] == text
    sample = measure_sample(recipe)
    assert (sample.rows, sample.overlong) == (46, manifest.dropped["overlong"])
    assert (sample.tokens, sample.unrendered, sample.fault) == (sum(kept), 0, "")
    assert sample.lengths == manifest.length_quantiles and sample.unused == manifest.unused
    assert sample.in_train_too == 5
    assert ("Note", text) in dict(data_statistics({"data": manifest.summary()}))["Rows"]


def test_a_longer_pair_counts_as_the_two_texts_that_it_has(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """2 of 5 pairs fit: half of the texts are longer."""
    ask = {"role": "user", "content": "q"}
    pair = {"prompt": [ask], "chosen": [], "rejected": []}
    for name, text in (("chosen", "a"), ("rejected", "b")):
        pair[name] = [{"role": "assistant", "content": text}]
    long = {**pair, "prompt": [{**ask, "content": "word " * 60}]}
    train = write_jsonl(tmp_path / "train.jsonl", [pair] * 2 + [long] * 3)
    recipe = make_recipe(train=train, max_length=48, method={"kind": "dpo"})
    lengths = run(recipe, tmp_path).manifest.length_quantiles
    assert lengths["0.5"] is None and measure_sample(recipe).lengths == lengths


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ({"0.5": 10, "1": 20}, "half up to 10, the longest 20 tokens"),
        ({"0.5": 10, "0.9": None, "1": None}, "half up to 10, others more than 48 tokens"),
        ({"0.5": None, "1": None}, "most more than 48 tokens"),
        ({}, ""),
    ],
)
def test_lengths_are_described(lengths: dict[str, int | None], text: str) -> None:
    assert describe_lengths(lengths, 48) == text


@pytest.mark.parametrize("overlong", ["drop", "truncate", "truncate_left", "split"])
def test_rows_that_are_too_long(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any, overlong: str
) -> None:
    row = chat_row("q " + "word " * 6, "the answer is " + "one two " * 20)
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    path = write_jsonl(tmp_path / "a.jsonl", [row, chat_row("q", "a")])
    recipe = make_recipe(train=path, max_length=64, overlong=overlong, packing=False)
    prepared = run(recipe, tmp_path)
    stored = sequences(prepared, prepared.manifest.train)
    ids_of_row = [part["input_ids"] for part in stored if part["rows"][0] == 0]
    expected = {
        "drop": [],
        "truncate": [ids[:64]],
        "truncate_left": [ids[-64:]],
        "split": [ids[start : start + 64] for start in range(0, len(ids), 64)],
    }[overlong]
    assert sorted(ids_of_row) == sorted(expected) and len(ids) > 64
    assert prepared.manifest.notes.get("cut", 0) == overlong.startswith("truncate")
    assert prepared.manifest.dropped == ({"overlong": 1} if overlong == "drop" else {})


def test_a_pair_that_is_cut_keeps_one_prompt(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any
) -> None:
    pair = {"prompt": "word" * 30, "chosen": " one", "rejected": " two three four"}
    path = write_jsonl(tmp_path / "a.jsonl", [pair])
    recipe = make_recipe(train=path, method="dpo", max_length=24, overlong="truncate_left")
    (stored,) = sequences(run(recipe, tmp_path), run(recipe, tmp_path).manifest.train)
    first = stored["lengths"][0]
    chosen, rejected = stored["input_ids"][:first], stored["input_ids"][first:]
    trained = stored["trainable"][:first].index(True)
    assert chosen[:trained] == rejected[:trained] and len(rejected) == 24
    assert chosen[0] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match=r"overlong split: only single documents"):
        make_recipe(train=path, method="dpo", overlong="split")


def test_rows_of_a_function_and_a_slice(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Rows keep their numbers in the source, and those left out are counted."""
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"n": n} for n in range(20)])
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"n": n} for n in range(20, 24)])
    code = (
        "def f(row):\n    if row['n'] % 3 == 0:\n        return None\n"
        "    return {'prompt': 'q', 'completion': str(row['n'])}\n"
    )
    source = {"path": str(tmp_path / "set"), "map": {"file": "/f.py:f", "source": code}}
    recipe = make_recipe(
        train=[{**source, "limit": 10}], eval=[{**source, "split": "test[:3]"}], packing=False
    )
    prepared = run(recipe, tmp_path)
    assert (prepared.manifest.rows_read, prepared.manifest.dropped) == (13, {"left_out": 5})
    rows = [row["rows"] for row in sequences(prepared, prepared.manifest.train)]
    assert sorted(rows) == [[n] for n in range(10) if n % 3]
    assert [source.path for source in prepared.manifest.sources] == [
        f"{tmp_path}/set (the first 10 rows)",
        f"{tmp_path}/set (test[:3])",
    ]
