"""Packed rows: this finray against itself at an earlier commit, and attention by documents against
sdpa with a mask over the whole row.

All take rows of alpaca, with the loss of supervised fine-tuning, in a process each. Against the
earlier commit whole steps of training are measured; their peak is that of resident memory above
the peak of a run whose rows are short. Against the mask a forward and a backward pass are measured;
their peak is above the loaded model. Speed is useful tokens per second of CPU time. glibc's heap
keeps gaps between large tensors, so all processes map those by themselves.
"""

import argparse
import json
import os
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from contenders import Job, recipe_of, sequences
from earlier import Version, checked_out, full_name
from material import save_llama, save_tokenizer
from measure import (
    Figure,
    Options,
    Target,
    conclude,
    parse_options,
    print_result,
    ratios,
    reset_peak,
    resident_mb,
    run_child,
    scratch,
    take_turns,
)
from packing import add_arguments, find_rows
from throughput import prepared_job

FULL = {"vocabulary": 16_000, "hidden": 512, "layers": 6, "length": 4096, "longer": 16_384}
QUICK = {"vocabulary": 2_000, "hidden": 128, "layers": 2, "length": 1024, "longer": 4096}
MICRO, STEPS = 2, 1
COMMIT = "1aa0079"
WARMUP, TIMED = 1, 2
SHORT = 128
"""Tokens of a row beside which the others' memory counts."""
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def child(job: Job, isolation: Any, micro: int) -> dict[str, float]:
    """Take the steps of one contender."""
    import torch

    from finray.training.engine.methods import objective_of
    from finray.training.models.loading import load_model
    from finray.training.objectives.objective import Setup

    torch.set_num_threads(job.threads)
    recipe = recipe_of(job)
    model: Any = load_model(recipe, "causal").train()
    nothing: Any = None
    cpu = torch.device("cpu")
    setup = Setup(recipe, model, nothing, nothing, 0, 1, cpu, isolation=isolation)
    objective = objective_of(setup)
    objective.prepare()
    rows = cycle(sequences(job, 0, 1))
    objective.loss(model, objective.collate([next(rows)]), measured=False)  # loads what is lazy
    reset_peak()
    before, started, tokens = resident_mb("VmRSS"), time.process_time(), 0
    for _ in range(STEPS):
        batch = objective.collate(list(islice(rows, micro)))
        loss = objective.loss(model, batch, measured=False).total / batch.loss_units
        torch.autograd.backward(loss)
        tokens += batch.tokens
    seconds = time.process_time() - started
    peak = resident_mb("VmHWM") - before
    return {"speed": tokens / seconds, "peak": peak, "seconds": seconds, "tokens": tokens}


def recipe_values(
    folder: Path, rows: Path, sizes: dict[str, int], length: int, micro: int = MICRO
) -> dict[str, Any]:
    """A recipe for rows of `length` tokens; its model and tokenizer are written into the folder."""
    folder.mkdir()
    content = json.loads(rows.read_text(encoding="utf-8"))
    texts = [row[key] for row in content for key in ("instruction", "input", "output")]
    size = save_tokenizer(folder / "model", texts, sizes["vocabulary"])
    save_llama(folder / "model", size, sizes["hidden"], sizes["layers"], length)
    return {
        "name": "packed",
        "model": {
            "base": str(folder / "model"),
            "dtype": "float32",
            "gradient_checkpointing": False,
        },
        "adapter": {"kind": "lora"},
        "data": {"train": [{"path": str(rows)}], "max_length": length},
        "optim": {
            "batch_size": micro,
            "micro_batch_size": micro,
            "max_steps": WARMUP + TIMED + 1,
        },
        "scale": {"workers": 0},
        "storage": str(folder / "runs"),
    }


def make_job(folder: Path, rows: Path, sizes: dict[str, int], length: int, threads: int) -> Job:
    """Model, tokenizer and data with rows of `length` tokens."""
    return prepared_job(folder, recipe_values(folder, rows, sizes, length), STEPS, 0, threads)


def trainings(
    folder: Path, rows: Path, sizes: dict[str, int], options: Options, commit: str
) -> dict[str, list[dict[str, float]]]:
    """What whole steps take, now and at the earlier commit, of long and of short rows."""
    threads = options.threads
    versions = {"now": Version(), "earlier": Version(checked_out(commit, folder / "earlier"))}
    recipes = {
        "": recipe_values(folder / "trained", rows, sizes, sizes["length"]),
        ", short": recipe_values(folder / "trained-short", rows, sizes, SHORT, micro=1),
    }
    return take_turns(
        {
            f"{name}{kind}": partial(
                version.train,
                version.prepare(
                    folder / f"run of {name}{kind}", recipe, WARMUP + TIMED + 1, WARMUP, threads
                ),
                threads,
            )
            for name, version in versions.items()
            for kind, recipe in recipes.items()
        },
        options.repetitions,
    )


def trained_figures(turns: dict[str, list[dict[str, float]]], commit: str) -> list[Figure]:
    """Speed and peak of whole steps, over those at the earlier commit."""
    speeds = {
        name: [result["tokens"] / result["cpu_seconds"] for result in turns[name]]
        for name in ("now", "earlier")
    }
    peaks = {
        name: [
            long["peak_mb"] - short["peak_mb"]
            for long, short in zip(turns[name], turns[f"{name}, short"], strict=True)
        ]
        for name in ("now", "earlier")
    }
    return [
        Figure(
            f"tokens per CPU second, packed rows, finray / finray at {commit}",
            ratios(speeds["now"], speeds["earlier"]),
            Target("at least", 1.7),
        ),
        Figure(
            f"peak above that of short rows, finray / finray at {commit}",
            ratios(peaks["now"], peaks["earlier"]),
            Target("at most", 0.5),
        ),
    ]


def measured(folder: Path, name: str, job: Job, isolation: str, micro: int) -> dict[str, float]:
    """What a process of its own measures."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps([vars(job), isolation, micro]), encoding="utf-8")
    result: dict[str, float] = run_child(
        "packed_rows.py", "--child", str(file), threads=job.threads
    )
    return result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the data's place, the earlier commit, and the file that a child reads."""
    add_arguments(parser)
    parser.add_argument("--commit", default=COMMIT, help=f"the earlier one (default: {COMMIT})")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)


def figures_of(turns: dict[str, list[dict[str, float]]]) -> list[Figure]:
    """Speed and peak against a mask, and how they grow from short to long rows."""

    def of(name: str, key: str) -> list[float]:
        return [result[key] for result in turns[name]]

    def growth(key: str) -> tuple[float, ...]:
        per_token = [
            [value / count for value, count in zip(of(name, key), of(name, "tokens"), strict=True)]
            for name in ("longer rows", "one row")
        ]
        return ratios(*per_token)

    return [
        Figure(
            "tokens/s, by documents / with a mask",
            ratios(of("documents", "speed"), of("mask", "speed")),
        ),
        Figure(
            "peak above the model, by documents / with a mask",
            ratios(of("documents", "peak"), of("mask", "peak")),
        ),
        Figure("time per token, long / short rows", growth("seconds"), Target("at most", 1.2)),
        Figure("peak per token, long / short rows", growth("peak"), Target("at most", 1.2)),
    ]


def main() -> None:
    """Measure, and write the result."""
    options, given = parse_options(__doc__, add=arguments)
    if given.child is not None:
        job, isolation, micro = json.loads(given.child.read_text(encoding="utf-8"))
        print_result(child(Job(**job), isolation, micro))
        return
    conclude_with(options, find_rows(given.data), given.commit)


def conclude_with(options: Options, rows: Path, commit: str) -> None:
    """Compare the contenders in turns."""
    sizes = QUICK if options.quick else FULL
    os.environ.update(MAPPED)
    with scratch() as folder:
        trained = trainings(folder, rows, sizes, options, commit)
        short = make_job(folder / "short", rows, sizes, sizes["length"], options.threads)
        longer = make_job(folder / "longer", rows, sizes, sizes["longer"], options.threads)
        contenders = {
            "documents": (short, "documents", MICRO),
            "mask": (short, "positions", MICRO),
            "one row": (short, "documents", 1),
            "longer rows": (longer, "documents", 1),
        }
        calls = {name: partial(measured, folder, name, *how) for name, how in contenders.items()}
        turns = take_turns(calls, options.repetitions)
    flat = {
        f"{name}, {key}": [result[key] for result in results]
        for name, results in turns.items()
        for key in ("speed", "peak")
    } | {
        f"{name}, trained, {key}": [result[key] for result in results]
        for name, results in trained.items()
        for key in ("tokens", "cpu_seconds", "peak_mb")
    }
    figures = [*trained_figures(trained, commit), *figures_of(turns)]
    settings = {**sizes, "micro": MICRO, "earlier": full_name(commit)}
    conclude("packed_rows", options, figures, flat, settings)


if __name__ == "__main__":
    main()
