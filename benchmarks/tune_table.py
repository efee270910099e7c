"""Makes tune_table.json: the quickstart's task in short, over learning rate, rank and alpha.

Each cell is a run of 36 steps with the held-out loss at nine token counts, so that a search with
pruning can be simulated on the table (tune_quality.py) without training. There is a cell for every
setting and seed: a search sees one seed, and its result is scored by the other seeds.
The adapters are a grid of rank and alpha, and those of `search: default`; rsLoRA is as good as a
larger alpha, so all of them are pairs of rank and alpha. A cell that is in the table already is not
run again: the command can be stopped and started at any time.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import HERE, environment, scratch

TABLE = HERE / "tune_table.json"
QUICKSTART = HERE.parent / "recipes" / "quickstart" / "sft.yaml"
LEARNING_RATES = (1e-4, 2.2e-4, 4.6e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2, 2.2e-2)
RANKS = (4, 16, 64)
ALPHAS = (8, 32, 128)
DEFAULT_RANKS = (4, 8, 16, 32, 64)
RSLORA_ALPHA = 64
"""The quickstart's alpha, which `search: default` keeps with rsLoRA."""
SEEDS = 5
STEPS, EVERY, HELD_OUT_ROWS = 36, 4, 100


Setting = tuple[float, int, int, bool]
"""Learning rate, rank, alpha, rsLoRA."""


@dataclass(frozen=True)
class Cell:
    """The result of one setting with one seed."""

    seed: int
    learning_rate: float
    rank: int
    alpha: int
    rslora: bool
    tokens: list[int]
    """Trained tokens at each evaluation."""
    eval_loss: list[float | None]
    """Held-out loss at each evaluation; None if it was not a number."""

    @property
    def setting(self) -> Setting:
        """The cell's values of the searched keys."""
        return self.learning_rate, self.rank, self.alpha, self.rslora

    @property
    def key(self) -> tuple[int, Setting]:
        """Seed and setting, which identify the cell."""
        return self.seed, self.setting

    @property
    def final(self) -> float:
        """Held-out loss at the end; infinite if the run did not finish."""
        last = self.eval_loss[-1] if self.eval_loss else None
        return math.inf if last is None or len(self.eval_loss) < STEPS // EVERY else last


def read_table() -> list[Cell]:
    """Read the existing cells."""
    if not TABLE.exists():
        return []
    return [Cell(**cell) for cell in json.loads(TABLE.read_text(encoding="utf-8"))["cells"]]


def write_table(cells: list[Cell]) -> None:
    """Write the table, one cell per line."""
    settings = {
        "recipe": "recipes/quickstart/sft.yaml",
        "steps": STEPS,
        "batch_size": 4,
        "held_out_rows": HELD_OUT_ROWS,
        "eval_every_steps": EVERY,
    }
    lines = ",\n".join(json.dumps(asdict(cell)) for cell in sorted(cells, key=lambda c: c.key))
    head = json.dumps({"settings": settings, "environment": environment(1)}, indent=1)
    temporary = TABLE.with_suffix(".new")
    temporary.write_text(f'{head[:-2]},\n "cells": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(TABLE)


def scaling(rank: int, alpha: int, rslora: bool) -> float:
    """Factor by which an adapter's product B · A is scaled."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def every_key() -> list[tuple[int, Setting]]:
    """Seed and setting of every cell of the table."""
    grid = [(rank, alpha, False) for rank in RANKS for alpha in ALPHAS]
    tied = [(rank, 2 * rank, False) for rank in DEFAULT_RANKS]
    rslora = [(rank, RSLORA_ALPHA, True) for rank in DEFAULT_RANKS]
    # Settings of equal scaling are equal.
    adapters = list({(item[0], scaling(*item)): item for item in [*rslora, *tied, *grid]}.values())
    cells = itertools.product(range(SEEDS), LEARNING_RATES, adapters)
    return [(seed, (rate, *adapter)) for seed, rate, adapter in cells]


def measure_cell(folder: Path, seed: int, setting: Setting) -> Cell:
    """Train one setting with one seed in this process."""
    from finray.training.common.errors import RunError
    from finray.training.config.recipe import load_recipe
    from finray.training.launch.in_process import InProcessLauncher
    from finray.training.records.run_folder import read_metrics
    from finray.training.run import run_folder, train

    learning_rate, rank, alpha, rslora = setting
    settings: dict[str, Any] = {
        "name": f"lr{learning_rate:g}-r{rank}-a{alpha}{'-rs' if rslora else ''}-s{seed}",
        "seed": seed,
        "storage": folder,
        "adapter.rank": rank,
        "adapter.alpha": alpha,
        "adapter.rslora": rslora,
        "optim.learning_rate": learning_rate,
        "optim.epochs": "null",
        "optim.max_steps": STEPS,
        "optim.batch_size": 4,
        "data.eval.0.path": folder / "eval.jsonl",
        "eval.every_steps": EVERY,
        "eval.samples": 0,
        "checkpoint.every_steps": STEPS,
        "log.every_steps": EVERY,
        "log.to": "[]",
        "scale.workers": 0,
    }
    recipe = load_recipe(QUICKSTART, tuple(f"{key}={value}" for key, value in settings.items()))
    try:
        train(recipe, InProcessLauncher())
    except RunError as error:
        print(f"{recipe.name}: {error}", flush=True)
    lines = read_metrics(run_folder(recipe))
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    steps = sorted(tokens.keys() & held_out.keys())
    return Cell(
        *(seed, *setting),
        [tokens[step] for step in steps],
        [None if held_out[step] is None else round(held_out[step], 6) for step in steps],
    )


def main() -> None:
    """Measure the missing cells of the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: 2)")
    processes = parser.parse_args().processes
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    cells = read_table()
    done = {cell.key for cell in cells}
    keys = every_key()
    spawn = multiprocessing.get_context("spawn")
    with scratch() as folder, ProcessPoolExecutor(processes, spawn) as pool:
        rows = (QUICKSTART.parent / "eval.jsonl").read_text(encoding="utf-8").splitlines(True)
        (folder / "eval.jsonl").write_text("".join(rows[:HELD_OUT_ROWS]), encoding="utf-8")
        waited = [pool.submit(measure_cell, folder, *key) for key in keys if key not in done]
        for future in as_completed(waited):
            cells.append(future.result())
            write_table(cells)
            print(f"{len(cells)}/{len(keys)} {cells[-1]}", flush=True)


if __name__ == "__main__":
    main()
