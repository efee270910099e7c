"""Curated data at size, in stages: near duplicates against datasketch, a whole pipeline against
datasets and TRL, peak memory, packed rows, waiting for data, and the first batch of a resumed run.

`--stage NAME` measures one of them (again for more) and leaves the results of the others as they
are; each names its commit. Contenders run in processes of their own, on one core; CPU time is
compared, so that other work of the machine disturbs little. Where datasketch is not installed, a
stand-in computes as its MinHash and MinHashLSH do, a document at a time: SHA-1 of each shingle,
numpy's permutations, bands.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from material import Words, save_llama, save_tokenizer, texts_of, write_rows
from measure import (
    Figure,
    Options,
    Target,
    child_environment,
    conclude_stage,
    finray_command,
    parse_options,
    print_result,
    ratios,
    run_child,
    scratch,
    take_turns,
)
from prepare_memory import write_size

FULL = {
    "documents": 200_000,
    "sample": 10_000,
    "pipeline_mb": 200,
    "memory_mb": (100, 1000),
    "resumed_files": 250,
    "steps": 60,
}
QUICK = {
    "documents": 5_000,
    "sample": 1_000,
    "pipeline_mb": 4,
    "memory_mb": (10, 40),
    "resumed_files": 40,
    "steps": 10,
}
"""The stand-in and datasketch read a sample of the documents: their time is linear in them."""
OBJECT_STORE = 512 * 2**20
FILE_ROWS = 2000
"""Rows of a file of prepared data, 8 MB of tokens."""
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
    }


def finray_memory(folder: Path, rows: str) -> dict[str, Any]:
    """The same by Ray Data, with a small object store; the peak of all processes together."""
    import ray

    from finray.cluster.environment import set_environment
    from finray.training.common.storage import Folder
    from finray.training.data.prepare import prepare
    from finray.training.data.tasks import run_on_ray_data

    set_environment()
    recipe = recipe_of(folder, rows, curate=CURATE, eval=str(folder / "eval.jsonl"))
    with _Peak() as peak:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
        )
        prepared = prepare(recipe, Folder(recipe.storage) / "prepared", run_on_ray_data)
        ray.shutdown()
    shutil.rmtree(recipe.storage)
    return {"rows": prepared.manifest.rows_read, "peak_mb": peak.bytes / 1e6}


@dataclass
class _Peak:
    """The largest proportional set size of this process and those below it, twice a second."""

    bytes: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "_Peak":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self.bytes = max(self.bytes, sum(map(_memory_of, _tree(os.getpid()))))


def _tree(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
        parents[parent].append(int(path.parent.name))
    tree = [root]
    for process in tree:
        tree += parents[process]
    return tree


def _memory_of(process: int) -> int:
    """Bytes of a process; what several share is divided among them."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def make_prepared(folder: Path, files: int) -> None:
    """Write prepared data: the same rows in each file."""
    import pyarrow as pa

    from finray.training.common.storage import Folder
    from finray.training.data.prepared import ROW_GROUP, SEQUENCE_SCHEMA, write_hashed

    draw = np.random.default_rng(0)
    offsets = pa.array(LENGTH * np.arange(FILE_ROWS + 1), pa.int32())
    one = pa.array(np.arange(FILE_ROWS + 1), pa.int32())
    tokens = FILE_ROWS * LENGTH
    table = pa.table(
        [
            pa.ListArray.from_arrays(offsets, draw.integers(0, 50_000, tokens, np.int32)),
            pa.ListArray.from_arrays(one, np.full(FILE_ROWS, LENGTH, np.int32)),
            pa.ListArray.from_arrays(offsets, pa.array(np.ones(tokens, np.bool_))),
            pa.ListArray.from_arrays(one, np.arange(FILE_ROWS)),
            pa.nulls(FILE_ROWS, pa.string()),
        ],
        schema=SEQUENCE_SCHEMA,
    )
    (folder / "train").mkdir()
    options = {"row_group_size": ROW_GROUP, "use_dictionary": False}
    hashed = write_hashed(Folder(str(folder)), "train/000000.parquet", table, **options)
    names = [f"train/{number:06d}.parquet" for number in range(files)]
    for name in names[1:]:
        shutil.copyfile(folder / names[0], folder / name)
    full, rest = divmod(FILE_ROWS, ROW_GROUP)
    groups = (*[ROW_GROUP] * full, *([rest] if rest else []))
    split = {
        "files": names,
        "hashes": [hashed] * files,
        "row_groups": [groups] * files,
        "sequences": files * FILE_ROWS,
        "documents": files * FILE_ROWS,
        "tokens": files * tokens,
        "trainable_tokens": files * tokens,
        "capacity": LENGTH,
    }
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")


def first_batch(folder: Path, share: str) -> dict[str, Any]:
    """Seconds to the first batch from a share of the first epoch on."""
    from finray.training.common.storage import Folder
    from finray.training.data.prepared import Split
    from finray.training.data.stream import Slice, stream

    values = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    names = ("files", "hashes", "row_groups")
    split = Split(**{**values, **{name: tuple(map(_tuple, values[name])) for name in names}})
    batch = 8
    step = int(split.sequences * float(share)) // batch
    started = time.perf_counter()
    part = Slice(Folder(str(folder)), split, 0, batch, 0, 1, step, split.sequences // batch)
    rows = stream(part, on_ray=False)
    taken = list(islice(rows, batch))
    seconds = time.perf_counter() - started
    rows.close()  # type: ignore[attr-defined]
    return {"seconds": seconds, "rows": len(taken)}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def waiting(folder: Path, how: str, steps: int) -> float:
    """The share of a training's step time for which it waits for data."""
    recipe = {
        "name": f"waiting-{how}",
        "model": {"base": str(folder / "model")},
        "adapter": {"kind": "lora"},
        "data": {"train": str(folder / "chats.jsonl"), "max_length": LENGTH, "prepare": how},
        "optim": {"max_steps": steps, "batch_size": 8, "micro_batch_size": 4},
        "log": {"every_steps": 1},
        "storage": str(folder / "trained"),
    }
    path = folder / f"waiting-{how}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    command = [*finray_command(), "train", str(path), "--local"]
    subprocess.run(command, check=True, capture_output=True, env=child_environment())
    metrics = folder / "trained" / f"waiting-{how}" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.open(encoding="utf-8")]
    lines = [line for line in lines if "data_wait" in line][1:]  # the first step also loads
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    waited: float = sum(line["data_wait"] for line in lines[1:])
    return waited / seconds


def over_bound(lengths: Any, capacity: int) -> float:
    """Packed rows over the lower bound: the tokens' sum, or the bound of Martello and Toth."""
    import pyarrow as pa

    from finray.training.common.storage import Folder
    from finray.training.data.assembling import AssembleTask, Part, assemble_items
    from finray.training.data.rendering import Document
    from finray.training.data.tokenising import TokenFile

    with scratch() as folder:
        attempt = Folder(str(folder))
        for name in ("tokens", "train"):
            (attempt / name).create()
        file = TokenFile(attempt, "tokens/all.parquet")
        zeros, trained = np.zeros(capacity, np.int32), np.ones(capacity, np.bool_)
        for row, length in enumerate(lengths.tolist()):
            file.add(row, Document(zeros[:length], trained[:length], (length,)), None)
        file.flush()
        file.close()
        task = AssembleTask(attempt, capacity, True, seed=0)
        parts = [Part(group, 0) for group in file.groups]
        items = assemble_items("train", parts, capacity, True)
        rows = sum(sum(task(item).row_groups) for item in items)
        pa.default_memory_pool().release_unused()
    return rows / lower_bound(lengths, capacity)


def lower_bound(lengths: Any, capacity: int) -> int:
    """The fewest rows that could hold documents of these lengths."""
    ordered = np.sort(lengths.astype(np.int64))
    sums = np.concatenate(([0], np.cumsum(ordered)))
    best = -(-int(sums[-1]) // capacity)
    half = int(np.searchsorted(ordered, capacity // 2, side="right"))
    for least in np.unique(ordered[:half]).tolist():
        alone = int(np.searchsorted(ordered, capacity - least, side="right"))
        small = sums[half] - sums[np.searchsorted(ordered, least)]
        free = (alone - half) * capacity - (sums[alone] - sums[half])
        best = max(best, len(ordered) - half + max(0, -int(-(small - free) // capacity)))
    return best


def distributions(capacity: int, tokens: int) -> dict[str, Any]:
    """Lengths of documents, by the name of their distribution."""
    draw = np.random.default_rng(0)
    count = 400_000
    lengths = {
        "log-normal around a fifth": draw.lognormal(np.log(capacity / 5), 0.8, count),
        "log-normal around a half": draw.lognormal(np.log(capacity / 2), 1.0, count),
        "log-normal around a fiftieth": draw.lognormal(np.log(capacity / 50), 0.5, count),
        "uniform": draw.integers(1, capacity + 1, count),
        "normal around a quarter": draw.normal(capacity / 4, capacity / 20, count),
    }
    chosen = {}
    for name, values in lengths.items():
        whole = np.clip(values.astype(np.int32), 1, capacity)
        chosen[name] = whole[: int(np.searchsorted(np.cumsum(whole), tokens))]
    return chosen


def datasets_pipeline(folder: Path, rows: str) -> dict[str, Any]:
    """The same stages with datasets' map and filter, and TRL's packing; near duplicates by the
    datasketch or its stand-in, without the true similarity."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    evals = [json.loads(line) for line in (folder / "eval.jsonl").open(encoding="utf-8")]
    reference = {run for row in evals for run in _runs(_text(row["messages"]), CONTAMINATION)}
    cache = str(folder / f"cache-{time.monotonic_ns()}")  # nothing of an earlier turn is used
    started = time.process_time()
    data = load_dataset("json", data_files=str(folder / rows), split="train", cache_dir=cache)
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
        *(finray_pipeline, datasets_pipeline, finray_memory, first_batch),
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


@dataclass
class Measured:
    """What a stage measured."""

    figures: list[Figure]
    repetitions: Mapping[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def near_stage(folder: Path, sizes: dict[str, Any], options: Options) -> Measured:
    """Near duplicates: recall, precision, and speed on one core."""
    make_chats(folder, 1)  # for the tokenizer
    make_documents(folder / "documents.jsonl", sizes["documents"])
    with (folder / "documents.jsonl").open(encoding="utf-8") as lines:
        (folder / "documents-sample.jsonl").write_text("".join(islice(lines, sizes["sample"])))
    pairs = similar_pairs(folder / "documents.jsonl")
    contenders = {
        "texts, finray": partial(measured, "finray_texts", folder, "documents.jsonl"),
        "near, finray": partial(measured, "finray_near", folder, "documents.jsonl"),
        "near, other": partial(measured, "datasketch_near", folder, "documents-sample.jsonl"),
    }
    turns = take_turns(contenders, options.repetitions)
    speeds = speeds_of(turns)
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
    ]
    chosen = {name: sizes[name] for name in ("documents", "sample")}
    return Measured(figures, speeds, {**chosen, "near": other, "similar_pairs": len(pairs)})


def speeds_of(turns: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Rows per second of CPU time."""
    return {
        name: [result["rows"] / result["seconds"] for result in results]
        for name, results in turns.items()
    }


def pipeline_stage(folder: Path, sizes: dict[str, Any], options: Options) -> Measured:
    """The whole pipeline against datasets and TRL."""
    make_chats(folder, sizes["pipeline_mb"])
    contenders = {
        "pipeline, finray": partial(measured, "finray_pipeline", folder, "chats.jsonl"),
        "pipeline, other": partial(measured, "datasets_pipeline", folder, "chats.jsonl"),
    }
    turns = take_turns(contenders, options.repetitions)
    speeds = speeds_of(turns)
    without = [each["rows"] / each["without_near"] for each in turns["pipeline, other"]]
    figures = [
        Figure(
            "rows per CPU second, whole pipeline, finray / datasets and TRL",
            ratios(speeds["pipeline, finray"], speeds["pipeline, other"]),
            Target("at least", 1.3),
        ),
        Figure(
            "the same, without the other's near duplicates",
            ratios(speeds["pipeline, finray"], without),
        ),
    ]
    return Measured(figures, speeds, {"pipeline_mb": sizes["pipeline_mb"]})


def memory_stage(folder: Path, sizes: dict[str, Any], options: Options) -> Measured:
    """Peak memory of all processes of a preparation on Ray, for a small and a large file."""
    del options  # a peak hardly varies
    small, large = sizes["memory_mb"]
    make_chats(folder, min(200, small))
    block = (folder / "chats.jsonl").read_bytes()
    peaks = {}
    for megabytes in (small, large):
        name = f"chats-{megabytes}.jsonl"
        write_size(folder / name, block, megabytes * 1_000_000)
        peaks[megabytes] = measured("finray_memory", folder, name)["peak_mb"]
        (folder / name).unlink()
    figure = Figure(
        f"peak memory of all processes, {large} MB / {small} MB, object store of 512 MB",
        (peaks[large] / peaks[small],),
        Target("at most", 1.3),
    )
    return Measured([figure], {f"{mb} MB, peak MB": [peak] for mb, peak in peaks.items()})


def packing_stage(folder: Path, sizes: dict[str, Any], options: Options) -> Measured:
    """Packed rows over the lower bound."""
    del folder, options  # the rows are a function of the lengths
    tokens = 20_000_000 if sizes is FULL else 4_000_000
    figures = []
    for capacity in (1024, 4096, 32_768) if sizes is FULL else (1024,):
        for name, lengths in distributions(capacity, max(tokens, 4096 * capacity)).items():
            title = f"packed rows / lower bound, {capacity:,} tokens, {name}"
            figures.append(
                Figure(title, (over_bound(lengths, capacity),), Target("at most", 1.002))
            )
    return Measured(figures)


def resume_stage(folder: Path, sizes: dict[str, Any], options: Options) -> Measured:
    """The first batch of a run that resumes in mid-epoch, against that of a fresh one."""
    make_prepared(folder, sizes["resumed_files"])
    contenders = {
        name: partial(measured, "first_batch", folder, share)
        for name, share in (("fresh", "0"), ("resumed", "0.5"))
    }
    turns = take_turns(contenders, options.repetitions)
    seconds = {name: [each["seconds"] for each in results] for name, results in turns.items()}
    figure = Figure(
        "seconds to the first batch, resumed in mid-epoch / fresh",
        ratios(seconds["resumed"], seconds["fresh"]),
        Target("at most", 1.2),
    )
    megabytes = sizes["resumed_files"] * FILE_ROWS * LENGTH * 4 / 1e6
    return Measured([figure], seconds, {"prepared_mb": round(megabytes)})


def waiting_stage(folder: Path, sizes: dict[str, Any], options: Options) -> Measured:
    """The share of the steps' time for which they wait for data."""
    del options
    make_chats(folder, 20)
    figures = []
    for how in ("ahead", "streaming"):
        share = waiting(folder, how, sizes["steps"])
        title = f"waiting for data / time of all steps, data.prepare: {how}"
        figures.append(Figure(title, (share,), Target("at most", 0.01)))
    return Measured(figures, settings={"steps": sizes["steps"]})


MEASURES = {
    "near": near_stage,
    "pipeline": pipeline_stage,
    "memory": memory_stage,
    "packing": packing_stage,
    "resume": resume_stage,
    "waiting": waiting_stage,
}


def main() -> None:
    """Measure, and write the results of each stage."""

    def add(parser: argparse.ArgumentParser) -> None:
        names = tuple(MEASURES)
        parser.add_argument("--stage", action="append", choices=names, help="default: all")

    options, given = parse_options(__doc__, add=add)
    sizes: dict[str, Any] = QUICK if options.quick else FULL
    for stage in given.stage or MEASURES:
        with scratch() as folder:
            result = MEASURES[stage](folder, sizes, options)
        conclude_stage(
            "curation", stage, options, result.figures, result.repetitions, result.settings
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print_result(CHILDREN[sys.argv[2]](Path(sys.argv[3]), sys.argv[4]))
    else:
        main()
