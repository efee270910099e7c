"""Curation: near duplicates against datasketch, and a whole pipeline against datasets and TRL.

Contenders run in processes of their own, on one core; CPU time is compared, so that other work of
the machine disturbs little. Where datasketch is not installed, a stand-in computes as its MinHash
and MinHashLSH do, a document at a time: SHA-1 of each shingle, numpy's permutations, bands.
"""

import hashlib
import json
import re
import struct
import sys
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from material import Words, save_llama, save_tokenizer, texts_of, write_rows
from measure import (
    Figure,
    Target,
    conclude,
    parse_options,
    print_result,
    ratios,
    resident_mb,
    run_child,
    scratch,
    take_turns,
)
from prepare_memory import write_size

FULL = {"documents": 200_000, "sample": 10_000, "pipeline_mb": 200, "memory_mb": (100, 1000)}
QUICK = {"documents": 5_000, "sample": 1_000, "pipeline_mb": 4, "memory_mb": (10, 40)}
"""The stand-in and datasketch read a sample of the documents: their time is linear in them."""
JACCARD, PERMUTATIONS, NGRAM = 0.8, 128, 5
WORDS = 300
LENGTH = 1024
CONTAMINATION = 13


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
    """All pairs at or above the threshold, by rare shingles that both have: none is missed."""
    sets = [shingles(json.loads(line)["text"]) for line in path.open(encoding="utf-8")]
    first: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(sets):
        # Two sets of such a similarity have one of these in common, whatever the order.
        for shingle in sorted(each)[: len(each) - int(np.ceil(JACCARD * len(each))) + 1]:
            first[shingle].append(number)
    pairs = {(a, b) for owners in first.values() for b in owners for a in owners if a < b}
    return {
        (a, b)
        for a, b in pairs
        if len(sets[a] & sets[b])
        >= JACCARD * (len(sets[a]) + len(sets[b]) - len(sets[a] & sets[b]))
    }


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
        return _stand_in(texts)
    started = time.process_time()
    index = MinHashLSH(threshold=JACCARD, num_perm=PERMUTATIONS)
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        index.query(sketch)
        index.insert(number, sketch)
    seconds = time.process_time() - started
    return {"seconds": seconds, "rows": len(texts), "contender": "datasketch"}


def _stand_in(texts: list[str]) -> dict[str, Any]:
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
        found: set[int] = set()
        for band, table in enumerate(tables):
            bucket = table[sketch[band * rows : (band + 1) * rows].tobytes()]
            found.update(bucket)
            bucket.append(number)
    seconds = time.process_time() - started
    return {"seconds": seconds, "rows": len(texts), "contender": "stand-in for datasketch"}


def make_chats(folder: Path, megabytes: int) -> None:
    """Write conversations with repeated ones among them, evaluation data and the tokenizer."""
    rows = list(islice(Words().conversations(mean_words=80), 20_000))
    size = save_tokenizer(folder / "model", texts_of(rows[:2000]), 8_000)
    save_llama(folder / "model", size, hidden=64, layers=1, context=LENGTH)
    write_rows(folder / "eval.jsonl", rows[:200])
    fresh = Words(seed=2).conversations(mean_words=80)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as stream:
        number = 0
        while stream.tell() < megabytes * 1_000_000:
            row = rows[number % 500] if number % 10 == 0 else next(fresh)
            stream.write(json.dumps(row) + "\n")
            number += 1


CURATE = [
    "normalise",
    {"kind": "filter", "min_tokens": 16, "max_repetition": 0.2},
    {"kind": "deduplicate", "near": {"jaccard": JACCARD}},
    "decontaminate",
]


def finray_pipeline(folder: Path, rows: str) -> dict[str, Any]:
    """From raw file to packed rows, in this process."""
    from finray.training.common.storage import Folder
    from finray.training.data.prepare import prepare
    from finray.training.data.render_settings import RenderSettings
    from finray.training.data.rendering import load_renderer
    from finray.training.data.tasks import run_in_process

    recipe = recipe_of(folder, rows, curate=CURATE, eval=str(folder / "eval.jsonl"))
    load_renderer(RenderSettings.of(recipe))
    started = time.process_time()
    prepared = prepare(recipe, Folder(recipe.storage) / "prepared", run_in_process)
    seconds = time.process_time() - started
    manifest = prepared.manifest
    lengths = manifest.train.tokens / (manifest.train.sequences * LENGTH)
    return {
        "seconds": seconds,
        "rows": manifest.rows_read,
        "documents": manifest.train.documents,
        "fill": lengths,
        "peak_mb": resident_mb("VmHWM"),
    }


def datasets_pipeline(folder: Path, rows: str) -> dict[str, Any]:
    """The same stages with datasets' map and filter, and TRL's packing; near duplicates by the
    datasketch or its stand-in, without the true similarity."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    evals = [json.loads(line) for line in (folder / "eval.jsonl").open(encoding="utf-8")]
    reference = {run for row in evals for run in _runs(_text(row["messages"]), CONTAMINATION)}
    started = time.process_time()
    data = load_dataset(
        "json", data_files=str(folder / rows), split="train", cache_dir=str(folder / "cache")
    )
    count = len(data)
    data = data.map(_normalised).filter(lambda row: _passes(row, tokenizer))
    seen: set[str] = set()
    data = data.filter(
        lambda row: not (_text(row["messages"]) in seen or seen.add(_text(row["messages"])))
    )  # type: ignore[func-returns-value]
    near = _stand_in([_text(row["messages"]) for row in data])["seconds"]
    data = data.filter(
        lambda row: (
            not any(run in reference for run in _runs(_text(row["messages"]), CONTAMINATION))
        )
    )
    data = data.map(
        lambda row: {
            "input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=True)[
                "input_ids"
            ]
        },
        remove_columns=data.column_names,
    )
    packed = pack_dataset(data, LENGTH)
    seconds = time.process_time() - started
    return {
        "seconds": seconds,
        "without_near": seconds - near,
        "rows": count,
        "documents": len(data),
        "sequences": len(packed),
    }


def _normalised(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {**each, "content": unicodedata.normalize("NFC", each["content"])}
            for each in row["messages"]
        ]
    }


def _passes(row: dict[str, Any], tokenizer: Any) -> bool:
    if len(tokenizer(_text(row["messages"]))["input_ids"]) < 16:
        return False
    for each in row["messages"]:
        runs = list(_runs(each["content"], 5))
        if runs and 1 - len(set(runs)) / len(runs) > 0.2:
            return False
    return True


def _text(messages: Iterable[dict[str, str]]) -> str:
    return "\n".join(each["content"] for each in messages)


def _runs(text: str, length: int) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[n : n + length]) for n in range(len(words) - length + 1))


CHILDREN = {
    each.__name__: each
    for each in (
        *(finray_texts, finray_near, datasketch_near),
        *(finray_pipeline, datasets_pipeline),
    )
}


def measured(name: str, folder: Path, rows: str) -> dict[str, Any]:
    """Run a contender in a child process."""
    result: dict[str, Any] = run_child("curation.py", "--child", name, str(folder), rows, threads=1)
    return result


def quality(left: list[int], pairs: set[tuple[int, int]]) -> tuple[float, float]:
    """The share of similar pairs of which one is gone, and that of gone rows which have a pair."""
    stays = set(left)
    count = max((number for pair in pairs for number in pair), default=0) + 1
    gone = set(range(count)) - stays
    paired = {number for pair in pairs for number in pair}
    recall = sum(not (a in stays and b in stays) for a, b in pairs) / max(1, len(pairs))
    return recall, len(gone & paired) / max(1, len(gone))


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__)
    sizes: dict[str, Any] = QUICK if options.quick else FULL
    with scratch() as folder:
        make_chats(folder, sizes["pipeline_mb"])
        make_documents(folder / "documents.jsonl", sizes["documents"])
        lines = (folder / "documents.jsonl").open(encoding="utf-8")
        (folder / "documents-sample.jsonl").write_text("".join(islice(lines, sizes["sample"])))
        pairs = similar_pairs(folder / "documents.jsonl")
        block = (folder / "chats.jsonl").read_bytes()
        small, large = sizes["memory_mb"]
        for megabytes in (small, large):
            write_size(folder / f"chats-{megabytes}.jsonl", block, megabytes * 1_000_000)
        contenders = {
            "texts, finray": partial(measured, "finray_texts", folder, "documents.jsonl"),
            "near, finray": partial(measured, "finray_near", folder, "documents.jsonl"),
            "near, other": partial(measured, "datasketch_near", folder, "documents-sample.jsonl"),
            "pipeline, finray": partial(measured, "finray_pipeline", folder, "chats.jsonl"),
            "pipeline, other": partial(measured, "datasets_pipeline", folder, "chats.jsonl"),
        }
        turns = take_turns(contenders, options.repetitions)
        memory = {
            size: measured("finray_pipeline", folder, f"chats-{size}.jsonl")["peak_mb"]
            for size in (small, large)
        }
    speeds = {
        name: [result["rows"] / result["seconds"] for result in results]
        for name, results in turns.items()
    }
    without = [each["rows"] / each["without_near"] for each in turns["pipeline, other"]]
    recall, precision = quality(turns["near, finray"][0]["left"], pairs)
    other = turns["near, other"][0]["contender"]
    figures = [
        Figure(
            f"rows per CPU second, near duplicates of texts in memory, finray / {other}",
            ratios(speeds["texts, finray"], speeds["near, other"]),
            Target("at least", 8),
        ),
        Figure(
            f"the same, finray from raw file to finished stage / {other} in memory",
            ratios(speeds["near, finray"], speeds["near, other"]),
        ),
        Figure("recall at Jaccard 0.8", (recall,), Target("at least", 0.99)),
        Figure("precision", (precision,), Target("at least", 1)),
        Figure(
            "rows per CPU second, whole pipeline, finray / datasets and TRL",
            ratios(speeds["pipeline, finray"], speeds["pipeline, other"]),
            Target("at least", 1.3),
        ),
        Figure(
            "the same, without the other's near duplicates",
            ratios(speeds["pipeline, finray"], without),
        ),
        Figure(
            f"peak memory, {large} MB / {small} MB",
            (memory[large] / memory[small],),
            Target("at most", 1.3),
        ),
    ]
    settings = {**sizes, "near": other, "similar_pairs": len(pairs), "peak_mb": memory}
    conclude("curation", options, figures, speeds, settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print_result(CHILDREN[sys.argv[2]](Path(sys.argv[3]), sys.argv[4]))
    else:
        main()
