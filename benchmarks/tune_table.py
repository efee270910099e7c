"""Makes tune_table.json: the quickstart's task in short, over learning rate, rank and alpha.

Each cell is a run of 36 steps with the held-out loss at nine token counts, so that a search with
pruning can be played through on the table (tune_quality.py) without training anything. There is a
cell for every setting and seed: a search sees one seed, and what it found is judged by all. A cell
that is in the table already is not run again: the command can be stopped and started at any time.
"""

import argparse
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import HERE, environment, scratch

TABLE = HERE / "tune_table.json"
QUICKSTART = HERE.parent / "recipes" / "quickstart" / "sft.yaml"
LEARNING_RATES = (1e-4, 2.2e-4, 4.6e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2, 2.2e-2)
RANKS = (4, 16, 64)
ALPHAS = (8, 32, 128)
SEEDS = 5
STEPS, EVERY, HELD_OUT_ROWS = 36, 4, 100


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed, and what it reached."""

    seed: int
    learning_rate: float
    rank: int
    alpha: int
    tokens: list[int]
    """Trained tokens at each evaluation."""
    eval_loss: list[float | None]
    """Held-out loss there; None where it was not a number."""

    @property
    def setting(self) -> tuple[float, int, int]:
        """What is searched."""
        return self.learning_rate, self.rank, self.alpha

    @property
    def key(self) -> tuple[int, float, int, int]:
        """What the cell is found by."""
        return self.seed, *self.setting

    @property
    def final(self) -> float:
        """Held-out loss at the end; infinite where the run came to no end."""
        last = self.eval_loss[-1] if self.eval_loss else None
        return math.inf if last is None or len(self.eval_loss) < STEPS // EVERY else last


def read_table() -> list[Cell]:
    """The cells that are there."""
    if not TABLE.exists():
        return []
    return [Cell(**cell) for cell in json.loads(TABLE.read_text(encoding="utf-8"))["cells"]]


def write_table(cells: list[Cell], threads: int) -> None:
    """Replace the table, one cell a line."""
    settings = {
        "recipe": "recipes/quickstart/sft.yaml",
        "steps": STEPS,
        "batch_size": 4,
        "held_out_rows": HELD_OUT_ROWS,
        "eval_every_steps": EVERY,
    }
    lines = ",\n".join(json.dumps(asdict(cell)) for cell in sorted(cells, key=lambda c: c.key))
    head = json.dumps({"settings": settings, "environment": environment(threads)}, indent=1)
    temporary = TABLE.with_suffix(".new")
    temporary.write_text(f'{head[:-2]},\n "cells": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(TABLE)


def measure_cell(folder: Path, seed: int, learning_rate: float, rank: int, alpha: int) -> Cell:
    """Run one configuration in this process."""
    from finray.training.errors import RunError
    from finray.training.recipe import load_recipe
    from finray.training.run import Listener, run_folder, train
    from finray.training.run_folder import read_metrics
    from finray.training.stop import Stop

    settings: dict[str, Any] = {
        "name": f"lr{learning_rate:g}-r{rank}-a{alpha}-s{seed}",
        "seed": seed,
        "storage": folder,
        "adapter.rank": rank,
        "adapter.alpha": alpha,
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
        train(recipe, Listener(lambda _: None, lambda _: None), Stop())
    except RunError as error:
        print(f"{recipe.name}: {error}", flush=True)
    lines = read_metrics(run_folder(recipe))
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    steps = sorted(tokens.keys() & held_out.keys())
    return Cell(
        *(seed, learning_rate, rank, alpha),
        [tokens[step] for step in steps],
        [None if held_out[step] is None else round(held_out[step], 6) for step in steps],
    )


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    threads = parser.parse_args().threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    cells = read_table()
    done = {cell.key for cell in cells}
    grid = list(itertools.product(range(SEEDS), LEARNING_RATES, RANKS, ALPHAS))
    with scratch() as folder:
        rows = (QUICKSTART.parent / "eval.jsonl").read_text(encoding="utf-8").splitlines(True)
        (folder / "eval.jsonl").write_text("".join(rows[:HELD_OUT_ROWS]), encoding="utf-8")
        for key in grid:
            if key in done:
                continue
            cells.append(measure_cell(folder, *key))
            write_table(cells, threads)
            print(f"{len(cells)}/{len(grid)} {cells[-1]}", flush=True)


if __name__ == "__main__":
    main()
