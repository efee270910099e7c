"""DPO on pairs of log-normal lengths: this finray against itself at an earlier commit.

Both train the same LoRA adapter on the same pairs, each in its own order, in float32 and in a
process of its own. Padding does not count: the earlier commit pads the texts of a microbatch to the
longest one.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from earlier import Version, checked_out, full_name
from material import Words, save_llama, save_tokenizer, write_rows
from measure import (
    Figure,
    NotComparable,
    Options,
    Target,
    conclude,
    parse_options,
    ratios,
    scratch,
    take_turns,
)

COMMIT = "1aa0079"
FULL = {"vocabulary": 16_000, "hidden": 256, "layers": 6, "length": 512, "words": 60}
QUICK = {"vocabulary": 4_000, "hidden": 128, "layers": 3, "length": 256, "words": 30}
SIZES = {"batch": 8, "micro": 4}
WARMUP, TIMED = 3, 12
STEPS = WARMUP + TIMED + 1
SPREAD = 0.7
"""Of the logarithm of an answer's length."""


def make_rows(sizes: dict[str, int]) -> list[dict[str, str]]:
    """Pairs whose answers have lengths of their own."""
    words, random = Words(), np.random.default_rng(0)
    most = sizes["length"] // 3  # a word has one to two tokens

    def text(mean: float) -> str:
        return words.text(int(np.clip(random.lognormal(np.log(mean), SPREAD), 2, most)))

    return [
        {
            "prompt": text(sizes["words"] / 4),
            "chosen": f" {text(sizes['words'])}",
            "rejected": f" {text(sizes['words'])}",
        }
        for _ in range(2 * STEPS * SIZES["batch"])
    ]


def make_recipe(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Model, tokenizer and rows in a folder, and the recipe that names them."""
    model, rows = folder / "model", make_rows(sizes)
    texts = (text for row in rows for text in row.values())
    size = save_tokenizer(model, texts, sizes["vocabulary"])
    save_llama(model, size, sizes["hidden"], sizes["layers"], sizes["length"])
    write_rows(folder / "pairs.jsonl", rows)
    return {
        "name": "pairs",
        "model": {"base": str(model), "dtype": "float32"},
        "adapter": {"kind": "lora"},
        "method": {"kind": "dpo"},
        "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "max_length": sizes["length"]},
        "optim": {
            "batch_size": SIZES["batch"],
            "micro_batch_size": SIZES["micro"],
            "max_steps": STEPS,
            "learning_rate": 1e-5,
        },
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 10_000},
        "log": {"every_steps": 1},
    }


def measure(folder: Path, options: Options, commit: str) -> dict[str, list[dict[str, Any]]]:
    """What both measure, in turns.

    Raises:
        NotComparable: they begin with other losses.
    """
    sizes = QUICK if options.quick else FULL
    recipe = make_recipe(folder, sizes)
    versions = {"now": Version(), "earlier": Version(checked_out(commit, folder / "earlier"))}
    threads = options.threads
    turns = take_turns(
        {
            name: partial(
                version.train,
                version.prepare(folder / name / "run", recipe, STEPS, WARMUP, threads),
                threads,
            )
            for name, version in versions.items()
        },
        options.repetitions,
    )
    now, earlier = (turns[name][0]["losses"][0] for name in versions)
    if abs(now - earlier) > 1e-4:
        raise NotComparable(f"the first loss is {now} now, and {earlier} at {commit}")
    return turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument("--commit", default=COMMIT, help=f"the earlier one (default: {COMMIT})")


def main() -> None:
    """Measure, and write the result."""
    options, given = parse_options(__doc__, add=add_arguments)
    with scratch() as folder:
        turns = measure(folder, options, given.commit)
    speeds = {
        f"{name}, {clock}": [result["tokens"] / result[clock] for result in results]
        for name, results in turns.items()
        for clock in ("seconds", "cpu_seconds")
    }
    figures = [
        Figure(
            f"tokens/s, dpo on pairs of log-normal lengths, finray / finray at {given.commit}",
            ratios(speeds["now, seconds"], speeds["earlier, seconds"]),
            Target("at least", 1.5),
        ),
        # In addition to wall time, because other processes hardly affect it.
        Figure(
            "tokens per CPU second, the same",
            ratios(speeds["now, cpu_seconds"], speeds["earlier, cpu_seconds"]),
        ),
    ]
    settings = {**(QUICK if options.quick else FULL), **SIZES, "earlier": full_name(given.commit)}
    conclude("pairs", options, figures, speeds, {**settings, "steps_timed": TIMED})


if __name__ == "__main__":
    main()
