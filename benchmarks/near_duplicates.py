"""Near duplicates of documents with planted copies: finray, datasketch, and all pairs there are.

Where datasketch is not installed, a stand-in computes as its MinHash and MinHashLSH do, a document
at a time: SHA-1 of each shingle, numpy's permutations, bands.
"""

import hashlib
import json
import struct
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from material import Words, write_rows

JACCARD, PERMUTATIONS, NGRAM = 0.8, 128, 5
WORDS = 300
LENGTH = 1024


def make_documents(path: Path, count: int) -> None:
    """Write documents of 300 words, a fifth of them with a copy of which some words are changed."""
    words = Words()
    draw = np.random.default_rng(1)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        text = words.text(WORDS)
        rows.append({"text": text})
        if len(rows) % 5 == 0:
            copy = np.array(text.split())
            copy[draw.choice(WORDS, draw.integers(0, 9), replace=False)] = "changed"
            rows.append({"text": " ".join(copy)})
    draw.shuffle(rows)  # type: ignore[arg-type]
    write_rows(path, rows[:count])


def shingles(text: str) -> set[str]:
    """The runs of words by which documents are compared."""
    words = text.lower().split()
    return {" ".join(words[n : n + NGRAM]) for n in range(max(1, len(words) - NGRAM + 1))}


def similar_pairs(path: Path) -> set[tuple[int, int]]:
    """All pairs at or above the threshold, by shingles that both have: none is missed."""
    sets, firsts, owners = [], [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            hashes = np.unique([hash(shingle) for shingle in shingles(json.loads(line)["text"])])
            # Two sets of such a similarity have one of these in common, whatever the order.
            first = hashes[: len(hashes) - int(np.ceil(JACCARD * len(hashes))) + 1]
            sets.append(hashes)
            firsts.append(first)
            owners.append(np.full(len(first), number))
    keys, numbers = np.concatenate(firsts), np.concatenate(owners)
    order = np.argsort(keys, kind="stable")
    groups = np.split(numbers[order], np.flatnonzero(np.diff(keys[order])) + 1)
    pairs = {(a, b) for group in groups if len(group) > 1 for a in group for b in group if a < b}
    return {(int(a), int(b)) for a, b in pairs if similarity(sets[a], sets[b]) >= JACCARD}


def similarity(first: Any, second: Any) -> float:
    """Jaccard similarity of two sets, given as arrays."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def recipe_of(folder: Path, rows: str, **data: Any) -> Any:
    """A recipe over a file of the folder."""
    from finray.training.config.recipe import load_recipe

    values = {
        "name": "curation",
        "model": {"base": str(folder / "model")},
        "method": "pretrain" if "documents" in rows else "sft",
        "data": {"train": str(folder / rows), "max_length": LENGTH, **data},
        "scale": {"workers": 0},
        "storage": str(folder / f"runs-{time.monotonic_ns()}"),
    }
    return load_recipe(values)


def finray_near(folder: Path, rows: str) -> dict[str, Any]:
    """Deduplicate from raw file to finished stage; the reading of rows is part of it."""
    from finray.training.common.progress import SILENT
    from finray.training.common.storage import Folder
    from finray.training.data.curation.curate import curate
    from finray.training.data.curation.files import left_in
    from finray.training.data.resolve import resolve_data
    from finray.training.data.tasks import run_in_process

    near = {"jaccard": JACCARD, "permutations": PERMUTATIONS, "ngram": NGRAM}
    recipe = recipe_of(folder, rows, curate=[{"kind": "deduplicate", "near": near}])
    data = resolve_data(recipe)
    started = time.process_time()
    prepared = Folder(recipe.storage) / "prepared"
    done = curate(recipe, data, prepared, run_in_process, SILENT, lambda *_: None)
    seconds = time.process_time() - started
    left, before = [], 0
    for chunk, counts in zip(done.chunks, done.counts, strict=True):
        left += (left_in(done.folder / done.left, chunk.number) + before).tolist()
        before += counts.rows
    return {"seconds": seconds, "rows": before, "left": left}


def finray_texts(folder: Path, rows: str) -> dict[str, Any]:
    """Near duplicates of texts in memory: word runs, sketches, bands, and the true similarity."""
    from finray.training.config.curation import NearDuplicates
    from finray.training.data.curation.links import candidates_in, distinct, entries_of, jaccard
    from finray.training.data.curation.sketches import Bands, band_keys
    from finray.training.data.curation.words import word_runs

    near = NearDuplicates(jaccard=JACCARD, permutations=PERMUTATIONS, ngram=NGRAM)
    bands = Bands.of(near)
    texts = [json.loads(line)["text"] for line in (folder / rows).open(encoding="utf-8")]
    started = time.process_time()
    keys = []
    for start in range(0, len(texts), 1000):
        runs = word_runs(texts[start : start + 1000], NGRAM)
        keys.append(band_keys(runs.hashes, runs.offsets, bands))
    numbers = np.repeat(np.arange(len(texts)), bands.count)
    entries = entries_of(np.concatenate(keys).reshape(-1), numbers.astype(np.uint64), numbers)
    pairs = candidates_in(entries)
    runs = word_runs([texts[number] for number in np.unique(pairs)], NGRAM)
    sets = {
        int(number): distinct(runs.hashes[runs.offsets[n] : runs.offsets[n + 1]])
        for n, number in enumerate(np.unique(pairs))
    }
    similar = sum(jaccard(sets[a], sets[b]) >= JACCARD for a, b in pairs.tolist())
    seconds = time.process_time() - started
    return {"seconds": seconds, "rows": len(texts), "similar": similar}


def datasketch_near(folder: Path, rows: str) -> dict[str, Any]:
    """The same with datasketch: candidates alone, without the true similarity."""
    texts = [json.loads(line)["text"] for line in (folder / rows).open(encoding="utf-8")]
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        return stand_in(texts)
    started = time.process_time()
    index = MinHashLSH(threshold=JACCARD, num_perm=PERMUTATIONS)
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        index.query(sketch)
        index.insert(number, sketch)
    seconds = time.process_time() - started
    return {"seconds": seconds, "rows": len(texts), "contender": "datasketch"}


def stand_in(texts: list[str]) -> dict[str, Any]:
    """Candidates of texts as datasketch computes them."""
    prime, draw = np.uint64(2**61 - 1), np.random.default_rng(1)
    a, b = draw.integers(1, 2**61 - 1, (2, PERMUTATIONS), dtype=np.uint64)
    bands, rows = 9, 13  # as datasketch chooses them for 0.8 and 128
    tables: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(bands)]
    started = time.process_time()
    for number, text in enumerate(texts):
        hashes = np.array(
            [
                struct.unpack("<I", hashlib.sha1(shingle.encode()).digest()[:4])[0]
                for shingle in shingles(text)
            ],
            np.uint64,
        )
        with np.errstate(over="ignore"):
            sketch = (((hashes[:, None] * a + b) % prime) & np.uint64(2**32 - 1)).min(axis=0)
        neighbours: set[int] = set()
        for band, table in enumerate(tables):
            bucket = table[sketch[band * rows : (band + 1) * rows].tobytes()]
            neighbours.update(bucket)
            bucket.append(number)
    seconds = time.process_time() - started
    return {"seconds": seconds, "rows": len(texts), "contender": "stand-in for datasketch"}


def quality(left: list[int], pairs: set[tuple[int, int]]) -> tuple[float, float]:
    """The share of similar pairs of which one is gone, and that of gone rows which have a pair."""
    stays = set(left)
    count = max((number for pair in pairs for number in pair), default=0) + 1
    gone = set(range(count)) - stays
    paired = {number for pair in pairs for number in pair}
    recall = sum(not (a in stays and b in stays) for a, b in pairs) / max(1, len(pairs))
    return recall, len(gone & paired) / max(1, len(gone))
