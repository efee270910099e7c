"""Quality per cost: the default sweep against random search, played through on a table.

tune_table.json holds a run of the quickstart's task, in short, for each of 72 settings, with its
held-out loss at nine token counts. A trial walks along the curve of the cell that is nearest to
its settings; what it costs are the tokens it walked. The search is the product's own: its space,
its sampler, its pruner, its conductor. Random search draws from the whole table; the default sweep
from the learning rates within a factor of ten of the rule's, as `search: default` does, and once
more from the whole table.

A bound for orientation: who knows the best quarter of the cells beforehand, and spends a quarter of
random's budget on whole runs of cells drawn from it, comes to a regret of its own. (Each
cell was trained with one seed.)
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from measure import Asked, Figure, conclude, parse_options
from tune_table import ALPHAS, LEARNING_RATES, QUICKSTART, RANKS, Cell, read_table

from finray.tuning.conductor import Conductor
from finray.tuning.distribution import Distribution
from finray.tuning.metrics import Metric
from finray.tuning.rule import rule_of_thumb
from finray.tuning.samplers import make_pruner, make_sampler
from finray.tuning.space import Settings, Space
from finray.tuning.study import SweepStudy
from finray.tuning.sweep import Pruning, Sweep

RANDOM_TRIALS = 24
"""Whole runs that random search has; a third of the grid."""
SEEDS = 20
DEFAULT, WIDE = "default sweep", "the same over the whole table's rates"
NEAR = 0.02
"""Share of the best cell's loss by which a result may miss it."""


@dataclass
class Course:
    """What a search found over its cost."""

    cells: list[Cell]
    spent: int = 0
    found: list[tuple[int, float]] = field(default_factory=list)
    """(tokens spent, best loss so far) after every whole trial."""

    def at(self, tokens: float) -> float:
        """The best loss within a budget; that of the worst cell before anything was found."""
        worst = max(cell.final for cell in self.cells if math.isfinite(cell.final))
        return next((loss for spent, loss in reversed(self.found) if spent <= tokens), worst)

    def cost_of(self, loss: float) -> float:
        """Tokens spent until a loss was reached; infinite where it never was."""
        return next((spent for spent, best in self.found if best <= loss), math.inf)


def make_space(rule: bool) -> Space:
    """The table's settings: as wide as the table, or with the rates that the rule allows."""
    from finray.training.recipe import load_recipe

    changes = ("scale.workers=0", "eval.samples=0", "eval.every_steps=null")
    recipe = load_recipe(QUICKSTART, changes)
    low, high = LEARNING_RATES[0], LEARNING_RATES[-1]
    if rule:
        rate = rule_of_thumb(recipe)
        low, high = max(low, rate / 10), min(high, rate * 10)
    search = {
        "optim.learning_rate": Distribution(log_uniform=(low, high)),
        "adapter.rank": Distribution(choice=list(RANKS)),
        "adapter.alpha": Distribution(choice=list(ALPHAS)),
    }
    return Space(search, recipe, Path(), lambda key: key)


def nearest(cells: list[Cell], settings: Settings) -> Cell:
    """The cell of a setting: its rank and alpha, and the closest rate."""
    rate = math.log(settings["optim.learning_rate"])
    here = [
        cell
        for cell in cells
        if (cell.rank, cell.alpha) == (settings["adapter.rank"], settings["adapter.alpha"])
    ]
    return min(here, key=lambda cell: abs(math.log(cell.learning_rate) - rate))


def search(cells: list[Cell], space: Space, sweep: Sweep, budget: float) -> Course:
    """Play a sweep through, one trial at a time, until the budget is spent."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    whole = max(cell.tokens[-1] for cell in cells)
    study = SweepStudy(
        optuna.storages.InMemoryStorage(),
        sweep.name,
        [Metric("eval_loss", "min")],
        space,
        make_sampler(sweep, 0),
        make_pruner(sweep, sweep.pruning.kind != "none", min(c.tokens[-1] for c in cells)),
    )
    study.set_up([space.rule_of_thumb()] if sweep.sampler != "random" else [], [])
    conductor = Conductor(sweep, study, 1, 0.0, lambda _: None, lambda: None)
    course = Course(cells)
    while course.spent < min(budget, whole * sweep.trials):
        assignment = conductor.next()
        if assignment is None:
            break
        _walk(course, nearest(cells, assignment.settings), conductor, assignment.number)
    return course


def _walk(course: Course, cell: Cell, conductor: Conductor, number: int) -> None:
    """One trial along its cell's curve."""
    done, report = 0, {"status": "failed", "error": "the loss is not a number"}
    for place, (tokens, loss) in enumerate(zip(cell.tokens, cell.eval_loss, strict=True)):
        course.spent += tokens - done
        done = tokens
        is_last = place == len(cell.tokens) - 1
        if loss is None:
            break
        if conductor.reported(number, tokens, loss, is_last):
            report = {"status": "running", "measures": {"tokens": tokens}}
            break
        if is_last:
            best = min(loss, course.found[-1][1] if course.found else math.inf)
            course.found.append((course.spent, best))
            report = {"status": "finished", "measures": {"eval_loss": loss, "tokens": tokens}}
    conductor.ended(number, report)


def regret_of_knowing(cells: list[Cell], share: float, runs: int) -> float:
    """Expected regret of so many whole runs, drawn from the best share of the cells."""
    best = sorted(cell.final for cell in cells)[: round(share * len(cells))]
    total = math.comb(len(best), runs)
    return sum(
        (loss - best[0]) * math.comb(len(best) - 1 - place, runs - 1) / total
        for place, loss in enumerate(best)
    )


def main() -> None:
    """Play through and write."""
    options, _ = parse_options(__doc__, SEEDS)
    cells = read_table()
    best = min(cell.final for cell in cells)
    grid = sum(cell.tokens[-1] for cell in cells)
    full = RANDOM_TRIALS * max(cell.tokens[-1] for cell in cells)
    base = {"name": "quality", "recipe": {}, "trials": 10_000}
    courses: dict[str, list[Course]] = {"random": [], DEFAULT: [], WIDE: []}
    for seed in range(options.repetitions):
        settings = {**base, "seed": seed}
        plain = Sweep(**settings, sampler="random", pruning=Pruning(kind="none"))
        courses["random"].append(search(cells, make_space(False), plain, full))
        clever = Sweep(**settings)
        for name, rule in ((DEFAULT, True), (WIDE, False)):
            courses[name].append(search(cells, make_space(rule), clever, grid))
    whole = {name: [c.at(full) - best for c in each] for name, each in courses.items()}
    quarter = {name: [c.at(full / 4) - best for c in each] for name, each in courses.items()}
    cost = {name: [c.cost_of(best * (1 + NEAR)) for c in each] for name, each in courses.items()}
    figures = [
        Figure(
            f"mean regret at a quarter of the budget / random's at the full budget, {name}",
            (statistics.fmean(quarter[name]) / statistics.fmean(whole["random"]),),
            Asked("at most", 0.5) if name == DEFAULT else None,
        )
        for name in (DEFAULT, WIDE)
    ]
    figures.append(
        Figure(
            "expected regret of as many whole runs as a quarter of the budget pays, drawn from the "
            "best quarter of the cells / random's at the full budget",
            (
                regret_of_knowing(cells, 0.25, RANDOM_TRIALS // 4)
                / statistics.fmean(whole["random"]),
            ),
        )
    )
    # A search that never gets there counts as a whole grid.
    figures += [
        Figure(
            f"tokens until within {NEAR:.0%} of the best cell / the whole grid's, {name}",
            tuple(min(tokens / grid, 1.0) for tokens in cost[name]),
            Asked("at most", 0.2) if name == DEFAULT else None,
        )
        for name in (DEFAULT, WIDE)
    ]
    told = {f"regret at a quarter, {name}": values for name, values in quarter.items()}
    told |= {f"regret at the full budget, {name}": values for name, values in whole.items()}
    conclude("tune_quality", options, figures, told, {"cells": len(cells), "best": best})


if __name__ == "__main__":
    main()
