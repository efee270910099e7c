"""Curated data at size, in stages: near duplicates against datasketch, a whole pipeline against
datasets and TRL, peak memory, packed rows, waiting for data, and the first batch of a resumed run.

`--stage NAME` measures one of them (again for more) and leaves the results of the others as they
are; each names its commit. Contenders run in processes of their own, on one core; CPU time is
compared, so that other work of the machine disturbs little.
"""

import argparse
import json
import os
import re
import shutil
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
from near_duplicates import (
    JACCARD,
    LENGTH,
    datasketch_near,
    finray_near,
    finray_texts,
    make_documents,
    quality,
    recipe_of,
    similar_pairs,
    stand_in,
)
from prepare_memory import write_size
from prepared_rows import FILE_ROWS, distributions, first_batch, make_prepared, over_bound

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
CONTAMINATION = 13


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
    from finray.training.data.tasks import RunOnRayData

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
        prepared = prepare(recipe, Folder(recipe.storage) / "prepared", RunOnRayData())
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
    near = stand_in([_text(row["messages"]) for row in data])["seconds"]
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
