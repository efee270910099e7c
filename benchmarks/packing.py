"""Useful tokens per second on real instructions: finray packed against TRL's SFTTrainer unpacked.

Padding does not count. Both read the same rows, tokenise them with the same tokenizer and ChatML
template, train on the answers only, and train the same LoRA adapter in float32.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from contenders import Job
from material import save_llama, save_tokenizer
from measure import Figure, Options, Target, conclude, parse_options, ratios, scratch, take_turns
from throughput import prepared_job, run

FILE = "alpaca_en_demo.json"
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH = 1024
FULL = {"vocabulary": 8_000, "hidden": 128, "layers": 3, "batch": 2, "micro": 2}
QUICK = {"vocabulary": 2_000, "hidden": 128, "layers": 2, "batch": 2, "micro": 2}
LOG_EVERY = 10
FINRAY_STEPS, FINRAY_WARMUP = 15, 4
# TRL is timed between two logs, and its steps of eight documents are shorter.
TRL_STEPS, TRL_WARMUP = 40, 10
STEPS = {
    "finray": (FINRAY_STEPS, FINRAY_WARMUP),
    "trl_unpacked": (TRL_STEPS, TRL_WARMUP),
    "trl_unpacked_no_checkpointing": (TRL_STEPS, TRL_WARMUP),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument(
        "--data",
        type=Path,
        default=DEFAULT_DATA,
        help=f"folder that holds {FILE}, or the file (default: ../shared/data)",
    )


def find_rows(data: Path) -> Path:
    """Path of the instruction file.

    Raises:
        SystemExit: it is missing; the message names its source.
    """
    path = (data / FILE if data.is_dir() else data).resolve()
    if not path.is_file():
        raise SystemExit(
            f"{path}: there is no such file; give --data the folder that holds {FILE} "
            "(data/ of the public LLaMA-Factory repository)"
        )
    return path


def recipe_values(folder: Path, rows: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """A recipe with finray's defaults, except sizes and number of steps."""
    return {
        "name": "packing",
        "model": {"base": str(folder / "model"), "dtype": "float32"},
        "adapter": {"kind": "lora"},
        "data": {"train": [{"path": str(rows)}], "max_length": LENGTH},
        "optim": {
            "batch_size": sizes["batch"],
            "micro_batch_size": sizes["micro"],
            "max_steps": FINRAY_STEPS,
        },
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 10_000},
        "log": {"every_steps": LOG_EVERY},
        "storage": str(folder / "runs"),
    }


def make_jobs(folder: Path, rows: Path, options: Options) -> dict[str, Job]:
    """The job of each contender, with model, tokenizer and prepared data."""
    sizes = QUICK if options.quick else FULL
    content = json.loads(rows.read_text(encoding="utf-8"))
    texts = [row[key] for row in content for key in ("instruction", "input", "output")]
    size = save_tokenizer(folder / "model", texts, sizes["vocabulary"])
    save_llama(folder / "model", size, sizes["hidden"], sizes["layers"], LENGTH)
    values = recipe_values(folder, rows, sizes)
    return {
        name: prepared_job(folder, values, steps, warmup, options.threads, str(rows))
        for name, (steps, warmup) in STEPS.items()
    }


def main() -> None:
    """Measure, and write the result."""
    options, given = parse_options(__doc__, add=add_arguments)
    rows = find_rows(given.data)
    with scratch() as folder:
        jobs = make_jobs(folder, rows, options)
        contenders = {name: partial(run, name, job, folder) for name, job in jobs.items()}
        turns = take_turns(contenders, options.repetitions)
    speeds = {
        name: [result["tokens"] / result["seconds"] for result in measured]
        for name, measured in turns.items()
    }
    finray = speeds["finray"]
    figures = [
        Figure(
            "useful tokens/s, finray packed / TRL unpacked",
            ratios(finray, speeds["trl_unpacked"]),
            Target("at least", 1.5),
        ),
        Figure(
            "useful tokens/s, finray packed / TRL unpacked without gradient checkpointing",
            ratios(finray, speeds["trl_unpacked_no_checkpointing"]),
        ),
    ]
    settings = {**(QUICK if options.quick else FULL), "length": LENGTH, "trl_batch": 8}
    conclude("packing", options, figures, speeds, settings)


if __name__ == "__main__":
    main()
