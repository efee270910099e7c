"""Quality per cost: the default sweep against random search, simulated on a table.

tune_table.json holds runs of the quickstart's task, in short, for 120 settings of learning rate,
rank and alpha, each with five seeds, with their held-out loss at nine token counts. A simulated
trial follows the curve of the cell that is nearest to its settings; its cost is the tokens up to
where it ends. The search uses the product's space, first guesses, sampler, pruner and conductor.
Random search draws from the whole table. The default sweep is simulated again with the rule of
thumb as its only guess, and its sampler and pruning over the whole table, without the prior
knowledge of `search: default`.

A search sees the cells of one seed. The setting that it chooses is scored by the mean loss of the
other seeds: among the best settings, the seed changes the loss more than the settings do, so the
loss that the search saw is partly luck. For comparison, the same score is given for the best
setting after every setting of the table is trained once.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from measure import Figure, Target, conclude, parse_options
from tune_table import (
    LEARNING_RATES,
    QUICKSTART,
    Cell,
    Setting,
    read_table,
    scaling,
)

from finray.training.config.recipe import load_recipe
from finray.tuning.conductor import Conductor
from finray.tuning.default_search import default_space
from finray.tuning.distribution import Distribution, Settings
from finray.tuning.metrics import Metric
from finray.tuning.samplers import make_pruner, make_sampler
from finray.tuning.space import Space
from finray.tuning.study import SweepStudy
from finray.tuning.sweep import Pruning, Sweep

RANDOM_TRIALS = 24
"""Budget of random search in whole runs: a fifth of the table."""
SEEDS = 20
RANDOM, DEFAULT = "random search", "default sweep"
RULE_ONLY = "default sweep with the rule of thumb as its only guess"
PLAIN = "its sampler and pruning over the whole table"
NEAR = 0.02
"""A result is good if its loss is at most this share above that of the best cell."""


@dataclass(frozen=True)
class Table:
    """The cells of one seed, and the mean loss of the other seeds for each setting."""

    cells: list[Cell]
    truth: dict[Setting, float]
    """Mean loss of the other seeds, by setting."""

    @property
    def tokens(self) -> int:
        """Trained tokens of all runs of the table."""
        return sum(cell.tokens[-1] for cell in self.cells)

    @property
    def best(self) -> float:
        """The lowest final loss in the table."""
        return min(cell.final for cell in self.cells)

    def regret(self, cell: Cell | None) -> float:
        """Regret of choosing the cell's setting; without a cell, that of the worst setting."""
        finite = [loss for loss in self.truth.values() if math.isfinite(loss)]
        loss = math.inf if cell is None else self.truth[cell.setting]
        return min(loss, max(finite)) - min(finite)


def make_tables(cells: list[Cell]) -> list[Table]:
    """A table for each seed."""
    tables = []
    for seed in sorted({cell.seed for cell in cells}):
        others: dict[Setting, list[float]] = {}
        for cell in cells:
            if cell.seed != seed:
                others.setdefault(cell.setting, []).append(cell.final)
        truth = {setting: statistics.fmean(losses) for setting, losses in others.items()}
        tables.append(Table([cell for cell in cells if cell.seed == seed], truth))
    return tables


@dataclass
class Course:
    """The best cell of a search over the tokens that it spent."""

    spent: int = 0
    best: list[tuple[int, Cell]] = field(default_factory=list)
    """(tokens spent, best cell so far) after each whole trial."""

    def at(self, tokens: float) -> Cell | None:
        """The best cell within a budget of tokens; None before the first whole trial."""
        return next((cell for spent, cell in reversed(self.best) if spent <= tokens), None)

    def cost_of(self, loss: float) -> float:
        """Tokens spent until a loss was reached; infinite if it never was."""
        return next((spent for spent, cell in self.best if cell.final <= loss), math.inf)


@dataclass(frozen=True)
class Contender:
    """A search space, and the points that a search tries first."""

    space: Space
    points: list[Settings]


def make_contenders(cells: list[Cell]) -> dict[str, Contender]:
    """The contenders by name."""
    changes = ("scale.workers=0", "eval.samples=0", "eval.every_steps=null")
    recipe = load_recipe(QUICKSTART, changes)
    adapters = sorted({(cell.rank, cell.alpha, cell.rslora) for cell in cells})
    sections = [{"rank": rank, "alpha": alpha, "rslora": rs} for rank, alpha, rs in adapters]
    table = {
        "optim.learning_rate": Distribution(log_uniform=(LEARNING_RATES[0], LEARNING_RATES[-1])),
        "adapter": Distribution(choice=sections),
    }
    whole = Space(table, recipe, Path(), lambda key: key)
    default = Space(default_space(recipe), recipe, Path(), lambda key: key)
    rule = default.rule_of_thumb()
    return {
        RANDOM: Contender(whole, []),
        DEFAULT: Contender(default, [rule, *default.variations_of_the_rule()]),
        RULE_ONLY: Contender(default, [rule]),
        PLAIN: Contender(whole, []),
    }


def nearest(cells: list[Cell], space: Space, settings: Settings) -> Cell:
    """The cell with a setting's adapter and the closest learning rate."""
    recipe = space.recipe(settings)
    own = recipe.adapter
    assert own is not None
    adapter = (own.rank, scaling(own.rank, own.alpha, own.rslora))
    here = [
        cell
        for cell in cells
        if (cell.rank, scaling(cell.rank, cell.alpha, cell.rslora)) == adapter
    ]
    rate = math.log(recipe.optim.learning_rate)
    return min(here, key=lambda cell: abs(math.log(cell.learning_rate) - rate))


def search(cells: list[Cell], contender: Contender, sweep: Sweep, budget: float) -> Course:
    """Simulate a sweep, one trial at a time, until the budget is spent."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    whole = max(cell.tokens[-1] for cell in cells)
    study = SweepStudy(
        optuna.storages.InMemoryStorage(),
        sweep.name,
        [Metric("eval_loss", "min")],
        contender.space,
        make_sampler(sweep, 0),
        make_pruner(sweep, sweep.pruning.kind != "none", min(c.tokens[-1] for c in cells)),
    )
    study.set_up(contender.points, [])
    conductor = Conductor(sweep, study, 1, 0.0, lambda _: None, lambda: None)
    course = Course()
    while course.spent < min(budget, whole * sweep.trials):
        assignment = conductor.next_trial()
        if assignment is None:
            break
        cell = nearest(cells, contender.space, assignment.settings)
        _simulate_trial(course, cell, conductor, assignment.number)
    return course


def _simulate_trial(course: Course, cell: Cell, conductor: Conductor, number: int) -> None:
    """Simulate one trial along its cell's curve."""
    done, report = 0, {"status": "failed", "error": "the loss is not a number"}
    for place, (tokens, loss) in enumerate(zip(cell.tokens, cell.eval_loss, strict=True)):
        course.spent += tokens - done
        done = tokens
        is_last = place == len(cell.tokens) - 1
        if loss is None:
            break
        if conductor.report(number, tokens, loss, is_last):
            report = {"status": "running", "measures": {"tokens": tokens}}
            break
        if is_last:
            before = [best for _, best in course.best[-1:]]
            course.best.append((course.spent, min([cell, *before], key=lambda item: item.final)))
            report = {"status": "finished", "measures": {"eval_loss": loss, "tokens": tokens}}
    conductor.finish_trial(number, report)


def main() -> None:
    """Simulate, and write the result."""
    options, _ = parse_options(__doc__, SEEDS)
    tables = make_tables(read_table())
    whole = max(cell.tokens[-1] for table in tables for cell in table.cells)
    full = RANDOM_TRIALS * whole
    base = {"name": "quality", "recipe": {}, "trials": 10_000}
    contenders = make_contenders(tables[0].cells)
    courses: dict[str, list[Course]] = {name: [] for name in contenders}
    turns = [tables[turn % len(tables)] for turn in range(options.repetitions)]
    for seed, table in enumerate(turns):
        random = Sweep(**base, seed=seed, sampler="random", pruning=Pruning(kind="none"))
        for name, contender in contenders.items():
            sweep = random if name == RANDOM else Sweep(**base, seed=seed)
            courses[name].append(search(table.cells, contender, sweep, 2 * full))

    def regrets(name: str, tokens: float) -> list[float]:
        pairs = zip(turns, courses[name], strict=True)
        return [table.regret(course.at(tokens)) for table, course in pairs]

    def costs(name: str) -> tuple[float, ...]:
        """Tokens of each run; a search that never reaches the loss counts as the whole table."""
        return tuple(
            min(course.cost_of(table.best * (1 + NEAR)) / table.tokens, 1.0)
            for table, course in zip(turns, courses[name], strict=True)
        )

    of_random = statistics.fmean(regrets(RANDOM, full))
    of_table = [table.regret(min(table.cells, key=lambda cell: cell.final)) for table in turns]
    figures = [
        Figure(
            f"mean regret at a quarter of the budget / random's at the full budget, {name}",
            (statistics.fmean(regrets(name, full / 4)) / of_random,),
            Target("at most", 0.5) if name == DEFAULT else None,
        )
        for name in (DEFAULT, RULE_ONLY, PLAIN)
    ]
    figures.append(
        Figure(
            "mean regret of the best of the whole table / random's at the full budget",
            (statistics.fmean(of_table) / of_random,),
        )
    )
    figures += [
        Figure(
            f"tokens until within {NEAR:.0%} of the best cell / the whole table's, {name}",
            costs(name),
            Target("at most", 0.2) if name == DEFAULT else None,
        )
        for name in (DEFAULT, RULE_ONLY, PLAIN)
    ]
    values = {f"regret at a quarter, {name}": regrets(name, full / 4) for name in courses}
    values |= {f"regret at the full budget, {name}": regrets(name, full) for name in courses}
    values["regret of the best of the whole table"] = of_table
    facts = {"settings": len(tables[0].cells), "seeds": len(tables)}
    conclude("tune_quality", options, figures, values, facts)


if __name__ == "__main__":
    main()
