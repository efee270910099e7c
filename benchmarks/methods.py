"""The preference methods against TRL's own trainers, one process each: speed, losses, memory.

Both train the same LoRA adapter on the same rows in the same order, in float32. The losses of the
first 20 steps stand beside the speed, and say whether it was the same work.

To add a method: a variant in METHODS here, and its counterpart in trl_methods.py.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from contenders import Job
from material import Words, save_llama, save_tokenizer, write_rows
from measure import (
    Figure,
    Options,
    Target,
    conclude,
    parse_options,
    ratios,
    run_child,
    scratch,
    take_turns,
)
from throughput import prepared_job

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "dpo precomputed": {"kind": "dpo", "precompute_reference": True},
    "kto": {"kind": "kto"},
    "orpo": {"kind": "orpo"},
    "cpo": {"kind": "cpo"},
    "simpo": {"kind": "simpo"},
    "reward": {"kind": "reward"},
}
COMPARED_STEPS = 20
FULL = {"vocabulary": 16_000, "hidden": 256, "layers": 6, "length": 512, "batch": 4, "words": 60}
QUICK = {"vocabulary": 4_000, "hidden": 128, "layers": 3, "length": 256, "batch": 4, "words": 30}
WARMUP, TIMED = 4, 15
STEPS = WARMUP + TIMED + 1


def make_rows(kind: str, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of plain prompts and answers, which finray and TRL tokenise in the same way."""
    words = Words()
    rows: list[dict[str, Any]] = []
    talks = words.conversations(sizes["words"])
    # More rows than needed, because rows that are too long for the model are dropped.
    for number, talk in enumerate(islice(talks, 2 * COMPARED_STEPS * sizes["batch"])):
        prompt, answer = (message["content"] for message in talk["messages"])
        if kind == "kto":
            rows.append({"prompt": prompt, "completion": f" {answer}", "label": number % 2 == 0})
        else:
            rejected = f" {words.text(len(answer.split()))}"
            rows.append({"prompt": prompt, "chosen": f" {answer}", "rejected": rejected})
    return rows


def make_job(folder: Path, name: str, sizes: dict[str, int], threads: int) -> Job:
    """A job with model, tokenizer and prepared data for one method."""
    method = METHODS[name]
    model = folder / "model"
    rows = make_rows(method["kind"], sizes)
    if not model.exists():
        texts = (text for row in rows for text in row.values() if isinstance(text, str))
        size = save_tokenizer(model, texts, sizes["vocabulary"])
        save_llama(model, size, sizes["hidden"], sizes["layers"], sizes["length"])
    data = folder / f"{name}.jsonl"
    write_rows(data, rows)
    array = folder / f"{name}.json"
    array.write_text(json.dumps(rows), encoding="utf-8")
    values = {
        "name": "methods",
        "model": {"base": str(model), "dtype": "float32"},
        "adapter": {"kind": "lora"},
        "method": method,
        "data": {"train": [{"path": str(data)}], "max_length": sizes["length"]},
        "optim": {
            "batch_size": sizes["batch"],
            "micro_batch_size": sizes["batch"],
            "max_steps": STEPS,
            "learning_rate": 1e-3,
        },
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 10_000},
        "log": {"every_steps": 10},
        "storage": str(folder / "runs"),
    }
    return prepared_job(folder, values, STEPS, WARMUP, threads, rows=str(array))


def run(name: str, job: Job, folder: Path) -> dict[str, Any]:
    """Run one contender in a child process. Returns its printed result."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    result: dict[str, Any] = run_child("contenders.py", name, str(path), threads=job.threads)
    return result


def loss_difference(job: Job, folder: Path) -> float:
    """Largest absolute difference between finray's and TRL's losses in the first steps."""
    recipe = json.loads(json.dumps(job.recipe))
    recipe["log"]["every_steps"] = 1
    recipe["optim"]["max_steps"] = COMPARED_STEPS
    job = replace(job, recipe=recipe, steps=COMPARED_STEPS, warmup=0)
    losses = [run(name, job, folder)["losses"] for name in ("finray", "trl_method")]
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def compare(name: str, folder: Path, sizes: dict[str, int], options: Options) -> "Compared":
    """The figures of one method, and both speeds in every repetition."""
    job = make_job(folder, name, sizes, options.threads)
    difference = loss_difference(job, folder)
    both = {side: partial(run, side, job, folder) for side in ("finray", "trl_method")}
    turns = take_turns(both, options.repetitions)
    finray, trl = (
        [result["tokens"] / result["seconds"] for result in turns[side]]
        for side in ("finray", "trl_method")
    )
    cpu = [
        [result["tokens"] / result["cpu_seconds"] for result in turns[side]]
        for side in ("finray", "trl_method")
    ]
    figures = [
        Figure(f"tokens/s, {name}, finray / TRL", ratios(finray, trl), Target("at least", 1.2)),
        # In addition to wall time, because other processes hardly affect it.
        Figure(f"tokens per CPU second, {name}, finray / TRL", ratios(*cpu)),
        Figure(
            f"loss of the first {COMPARED_STEPS} steps, {name}, finray - TRL, largest",
            (1e6 * difference,),
            Target("at most", 100.0, "e-6"),
            unit="e-6",
        ),
    ]
    return figures, {f"{name}, finray": finray, f"{name}, TRL": trl}


Compared = tuple[list[Figure], dict[str, list[float]]]


def held_bytes(method: dict[str, Any], folder: Path, sizes: dict[str, int]) -> int:
    """Bytes of all parameters and buffers after a method has prepared its first batch."""
    job = make_job(folder, "dpo", sizes, 1)
    recipe = {**job.recipe, "method": method}
    path = folder / "held.json"
    path.write_text(json.dumps(asdict(replace(job, recipe=recipe))), encoding="utf-8")
    held: int = run_child("held.py", str(path))
    return held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument("--only", nargs="*", choices=METHODS, help="some of the methods")


def main() -> None:
    """Measure, and write the result."""
    options, given = parse_options(__doc__, add=add_arguments)
    sizes = QUICK if options.quick else FULL
    figures: list[Figure] = []
    speeds: dict[str, list[float]] = {}
    with scratch() as folder:
        for name in given.only or METHODS:
            compared, measured = compare(name, folder, sizes, options)
            figures += compared
            speeds |= measured
        held = [held_bytes({"kind": kind}, folder, sizes) for kind in ("dpo", "sft")]
    figures.append(
        Figure("bytes of model held, dpo / sft", (held[0] / held[1],), Target("at most", 1.1))
    )
    conclude("methods", options, figures, speeds, {**sizes, "steps_timed": TIMED, "held": held})


if __name__ == "__main__":
    main()
