"""Near duplicates: word runs, sketches and links against plain computations."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finray.training.common.storage import Folder
from finray.training.config.curation import NearDuplicates, band_rows
from finray.training.data.curation import grouping, links
from finray.training.data.curation.curate import train_chunks
from finray.training.data.curation.files import StageRows
from finray.training.data.curation.grouping import StageChunk, find_links
from finray.training.data.curation.links import components, jaccard
from finray.training.data.curation.passes import READ, PassItem, PassTask, Step
from finray.training.data.curation.sketches import Bands, band_keys
from finray.training.data.curation.words import word_runs
from finray.training.data.render_settings import RenderSettings
from finray.training.data.resolve import resolve_data
from finray.training.data.tasks import run_in_process

from .conftest import MakeRecipe, write_jsonl

WORD = re.compile(r"[a-z0-9\u00c0-\u07ff]+|[\u0800-\u1fff\u3000-\U0010ffff]")
ALPHABET = "abz09 ,.-_\n\t\0~ÀßéЖ،\u00a0«½’“→あ漢한😀\ufffdＡ\udc80"


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def runs_in(text: str, length: int) -> list[tuple[str, ...]]:
    words = words_of(text)
    count = max(1, len(words) - length + 1) if words else 0
    return [tuple(words[n : n + length]) for n in range(count)]


def test_word_runs_are_equal_where_the_words_are() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randrange(60))) for _ in range(2000)]
    for length in (1, 3, 13):
        runs = word_runs(texts, length)
        plain = [run for text in texts for run in runs_in(text, length)]
        assert runs.words.tolist() == [len(words_of(text)) for text in texts]
        assert np.diff(runs.offsets).tolist() == [len(runs_in(text, length)) for text in texts]
        assert len(plain) == len(runs.hashes)
        by_hash = dict(zip(runs.hashes.tolist(), plain, strict=True))
        assert len(by_hash) == len(set(plain)), "two runs have the same hash"
        assert all(
            by_hash[value] == run for value, run in zip(runs.hashes.tolist(), plain, strict=True)
        )


def test_word_runs_do_not_depend_on_their_neighbours() -> None:
    texts = ["a b c d", "", "x" * 100_000, "漢字 and words", "a b c d e"]
    together = word_runs(texts, 2)
    alone = [word_runs([text], 2).hashes for text in texts]
    assert together.hashes.tolist() == np.concatenate(alone).tolist()
    assert len(word_runs([], 2).hashes) == 0


def test_bands_propose_pairs_at_the_threshold() -> None:
    """The share of pairs with a common band, for sets of a known similarity."""
    draw = np.random.default_rng(0)
    for threshold, size in ((0.8, 296), (0.8, 27), (0.5, 300)):
        bands = Bands.of(NearDuplicates(jaccard=threshold))
        common = -(-2 * size * threshold // (1 + threshold))
        sets, count = [], 1500
        for _ in range(count):
            members = draw.integers(0, 2**64, 2 * size, dtype=np.uint64)
            sets += [members[:size], members[size - int(common) : 2 * size - int(common)]]
        offsets = np.arange(2 * count + 1) * size
        keys = band_keys(np.concatenate(sets), offsets, bands)
        proposed = (keys[::2] == keys[1::2]).any(axis=1).mean()
        assert proposed >= 0.99, (threshold, size)
        others = (keys[:-2:2] == keys[2::2]).any(axis=1).mean()
        assert others == 0
    assert band_rows(NearDuplicates(jaccard=0.8)) == 6


def test_jaccard() -> None:
    draw = np.random.default_rng(1)
    for _ in range(200):
        first, second = (
            np.unique(draw.integers(0, 30, draw.integers(1, 30))).astype(np.uint64)
            for _ in range(2)
        )
        a, b = set(first.tolist()), set(second.tolist())
        assert jaccard(first, second) == len(a & b) / len(a | b)


def test_components() -> None:
    draw = random.Random(2)
    for _ in range(100):
        pairs = np.array([draw.sample(range(40), 2) for _ in range(draw.randrange(1, 30))])
        group = {n: {n} for n in range(40)}
        for a, b in pairs.tolist():
            union = group[a] | group[b]
            for n in union:
                group[n] = union
        numbers, roots = components(pairs)
        assert numbers.tolist() == sorted({n for pair in pairs.tolist() for n in pair})
        assert roots.tolist() == [min(group[n]) for n in numbers.tolist()]
    assert [part.tolist() for part in components(np.zeros((0, 2), np.int64))] == [[], []]


def test_components_of_a_long_chain() -> None:
    """Each row is like the next one alone, as windows over a long text are."""
    rows = np.arange(100_000)
    for order in (slice(None), slice(None, None, -1)):
        pairs = np.stack([rows[:-1], rows[1:]], axis=1)[order]
        numbers, roots = components(pairs)
        assert np.array_equal(numbers, rows)
        assert not roots.any()


def links_of(make: MakeRecipe, folder: Path, texts: list[str], near: NearDuplicates) -> Any:
    data = write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts])
    recipe = make(train=data, method={"kind": "pretrain"})
    (chunk,) = train_chunks(recipe, resolve_data(recipe))
    stages, work = Folder(str(folder / "stages")), Folder(str(folder / "work")).create()
    (stages / "key").create()
    step = Step("key", READ, None, True)
    task = PassTask(stages, (step,), RenderSettings.of(recipe), 2**20, None)
    task(PassItem(0, chunk.chunk, chunk.reading, chunk.changes, None, None))
    rows = StageRows(stages, 0, "key", "key")
    chunks = [StageChunk(rows, chunk.reading, len(texts), 0)]
    return find_links(near, chunks, work, run_in_process, noted="sizes")


@pytest.mark.parametrize("small", [False, True])
def test_links_are_the_pairs_at_or_above_the_threshold(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """All pairs of 400 texts, with planted copies of every similarity; also in many small parts."""
    if small:
        monkeypatch.setattr(grouping, "_PARTITION_BYTES", 20_000)
        monkeypatch.setattr(grouping, "_BLOCK_PAIRS", 7)
        monkeypatch.setattr(links, "_PART_ROWS", 60)
    draw = random.Random(3)
    vocabulary = [f"w{n}" for n in range(3000)]
    texts: list[str] = []
    while len(texts) < 400:
        words = draw.choices(vocabulary, k=draw.choice((12, 40, 200)))
        texts.append(" ".join(words))
        for changes in draw.sample((0, 1, 2, 4, 8), 2):
            copy = list(words)
            for place in draw.sample(range(len(words)), changes):
                copy[place] = "changed"
            texts.append(" ".join(copy).upper())
    near = NearDuplicates(jaccard=0.7, ngram=3)
    sets = [set(runs_in(text, 3)) for text in texts]
    similar = {
        (a, b)
        for b in range(len(texts))
        for a in range(b)
        if len(sets[a] & sets[b]) >= 0.7 * len(sets[a] | sets[b])
    }
    linked = links_of(make_recipe, tmp_path, texts, near)
    assert {tuple(pair) for pair in linked.near.tolist()} <= similar and len(similar) > 100
    together = [linked.roots[a] == linked.roots[b] for a, b in similar]
    assert np.mean(together) >= 0.99


def test_a_large_bucket_has_few_pairs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """3,000 texts that are all nearly equal: one component, without a pair of any two."""
    base = [f"w{n}" for n in range(60)]
    texts = [" ".join([*base, f"x{n}"]) for n in range(3000)]
    linked = links_of(make_recipe, tmp_path, texts, NearDuplicates(jaccard=0.8))
    assert len(linked.near) < 3 * len(texts)
    assert set(linked.roots.tolist()) == {0}


def test_equal_rows_leave_one_entry_for_each_part(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are equal, no task compares more of them than there are parts."""
    monkeypatch.setattr(links, "_PART_ROWS", 100)
    compared: list[int] = []
    equal_rows = links.equal_rows

    def counted(entries: Any) -> Any:
        compared.append(len(entries))
        return equal_rows(entries)

    monkeypatch.setattr(links, "equal_rows", counted)
    linked = links_of(make_recipe, tmp_path, ["the same"] * 1000, NearDuplicates())
    assert compared == [100] * 10 + [10]
    assert set(linked.roots.tolist()) == {0} and linked.repeats.tolist() == [False] + [True] * 999
