"""Training speed: finray against a bare PyTorch loop and TRL's SFTTrainer, in one process each.

All train the same LoRA adapter on the same packed batches in the same order, in float32. They are
first checked to see the same token ids and to have the same losses; otherwise nothing is measured.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from contenders import Job
from material import Words, save_llama, save_tokenizer, texts_of, write_rows
from measure import (
    Figure,
    NotComparable,
    Options,
    Target,
    conclude,
    parse_options,
    ratios,
    run_child,
    scratch,
    take_turns,
)

CONTENDERS = ("finray", "bare", "trl", "trl_no_checkpointing")
LARGEST_DIFFERENCE = 1e-3
CHECKED_STEPS = 4
FULL = {"vocabulary": 16_000, "hidden": 256, "layers": 6, "length": 512, "batch": 4, "micro": 2}
QUICK = {"vocabulary": 4_000, "hidden": 128, "layers": 3, "length": 256, "batch": 4, "micro": 2}
WARMUP, TIMED, LOG_EVERY = 4, 10, 10
Speeds = dict[str, list[float]]
# One step more than is timed, because its beginning is the end of the last timed step.
STEPS = WARMUP + TIMED + 1


def make_job(folder: Path, sizes: dict[str, int], train_on: str, threads: int) -> Job:
    """The job of all contenders, with model, tokenizer and prepared data."""
    model = folder / "model"
    conversations = Words().conversations(mean_words=60)
    enough = 4 * STEPS * sizes["batch"] * sizes["length"] // 60
    rows = list(islice(conversations, enough))
    size = save_tokenizer(model, texts_of(rows), sizes["vocabulary"])
    save_llama(model, size, sizes["hidden"], sizes["layers"], sizes["length"])
    write_rows(folder / "rows.jsonl", rows)
    return prepared_job(folder, recipe_values(folder, sizes, train_on), STEPS, WARMUP, threads)


def prepared_job(
    folder: Path, values: dict[str, Any], steps: int, warmup: int, threads: int, rows: str = ""
) -> Job:
    """A job for a recipe; its data is prepared here, before anything is timed."""
    from finray.training.config.recipe import load_recipe
    from finray.training.run import prepare_data

    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    recipe = load_recipe(path)
    prepared = prepare_data(recipe)
    return Job(
        recipe=recipe.model_dump(mode="json"),
        prepared=prepared.folder.uri,
        rows=rows,
        steps=steps,
        warmup=warmup,
        threads=threads,
        watch_ids=False,
    )


def recipe_values(folder: Path, sizes: dict[str, int], train_on: str) -> dict[str, Any]:
    """A recipe with finray's defaults, except sizes and number of steps."""
    return {
        "name": "throughput",
        "model": {"base": str(folder / "model"), "dtype": "float32"},
        "adapter": {"kind": "lora"},
        "method": {"kind": "sft", "train_on": train_on},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl")}],
            "max_length": sizes["length"],
        },
        "optim": {
            "batch_size": sizes["batch"],
            "micro_batch_size": sizes["micro"],
            "max_steps": STEPS,
        },
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 10_000},
        "log": {"every_steps": LOG_EVERY},
        "storage": str(folder / "runs"),
    }


def run(name: str, job: Job, folder: Path) -> dict[str, Any]:
    """Run one contender in a child process. Returns its printed result."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    result: dict[str, Any] = run_child("contenders.py", name, str(path), threads=job.threads)
    return result


def check_same_work(job: Job, folder: Path) -> dict[str, list[float]]:
    """Losses of the first steps of each contender.

    Raises:
        NotComparable: losses or token ids differ between contenders.
    """
    recipe = json.loads(json.dumps(job.recipe))
    recipe["log"]["every_steps"] = 1
    recipe["optim"]["max_steps"] = CHECKED_STEPS
    # Large enough that a wrong gradient shows in the next losses.
    recipe["optim"]["learning_rate"] = 1e-2
    short = replace(job, recipe=recipe, steps=CHECKED_STEPS, warmup=0, watch_ids=True)
    results = {name: run(name, short, folder) for name in CONTENDERS}
    reference = results["bare"]
    for name, result in results.items():
        if result["ids"] != reference["ids"]:
            raise NotComparable(f"{name} received other token ids than the bare loop")
        pairs = zip(result["losses"], reference["losses"], strict=True)
        if max(abs(a - b) for a, b in pairs) > LARGEST_DIFFERENCE:
            raise NotComparable(
                f"losses: {name} {result['losses']}, bare loop {reference['losses']}"
            )
    return {name: result["losses"] for name, result in results.items()}


def measure(job: Job, folder: Path, options: Options) -> tuple[Speeds, Speeds]:
    """Tokens per second, and per second of CPU time, of every contender in every repetition."""
    contenders = {name: partial(run, name, job, folder) for name in CONTENDERS}
    turns = take_turns(contenders, options.repetitions)

    def speeds(clock: str) -> Speeds:
        return {
            name: [result["tokens"] / result[clock] for result in results]
            for name, results in turns.items()
        }

    return speeds("seconds"), speeds("cpu_seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument(
        "--train-on",
        choices=("all", "completions"),
        default="all",
        help="tokens that bear loss; all is the harder comparison, as finray computes no logits "
        "for the rest",
    )


def main() -> None:
    """Check, measure, write."""
    options, given = parse_options(__doc__, add=add_arguments)
    sizes = QUICK if options.quick else FULL
    with scratch() as folder:
        job = make_job(folder, sizes, given.train_on, options.threads)
        losses = check_same_work(job, folder)
        speeds, per_cpu = measure(job, folder, options)
    finray = speeds["finray"]
    figures = [
        Figure("tokens/s, finray / bare loop", ratios(finray, speeds["bare"]), at_least(0.97)),
        Figure("tokens/s, finray / TRL defaults", ratios(finray, speeds["trl"]), at_least(1.2)),
        Figure(
            "tokens/s, finray / TRL without gradient checkpointing",
            ratios(finray, speeds["trl_no_checkpointing"]),
        ),
        # In addition to wall time, because other processes hardly affect it.
        Figure(
            "tokens per CPU second, finray / bare loop", ratios(per_cpu["finray"], per_cpu["bare"])
        ),
    ]
    speeds |= {f"{name}, per CPU second": values for name, values in per_cpu.items()}
    settings = {**sizes, "train_on": given.train_on, "steps_timed": TIMED, "first_losses": losses}
    conclude("throughput", options, figures, speeds, settings)


def at_least(value: float) -> Target:
    """A target: at least this value."""
    return Target("at least", value)


if __name__ == "__main__":
    main()
