"""The sweep: a base recipe and what is searched, validated before anything is started.

`load_sweep` reads a YAML file; `Sweep` is what the rest of `tuning` receives.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..training.common.errors import InputError
from ..training.config.paths import resolve_path
from ..training.config.recipe import Recipe, check_no_secret, load_recipe, resolve_recipe
from ..training.config.section import PositiveInt, Section
from ..training.config.sections import Name
from ..training.config.yaml_file import Change, Document, apply_changes, read_recipe_file, validate
from .distribution import Distribution

_RECIPE = "recipe."
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _to_seconds(value: Any) -> Any:
    """Seconds of a number or of text such as 90s, 30m, 1.5h or 2d."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.replace(" ", ""))
    return float(match[1]) * _UNITS[match[2]] if match else value


Seconds = Annotated[float, Field(gt=0), BeforeValidator(_to_seconds)]


class Objective(Section):
    metric: str
    """What the run reports, such as eval_loss, or a size: adapter_bytes, trainable_parameters."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more is better; known for every metric, so it need not be given."""


def _as_objectives(value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    return [{"metric": one} if isinstance(one, str) else one for one in several]


class Pruning(Section):
    kind: Literal["auto", "asha", "median", "pbt", "none"] = "auto"
    """Which trials are stopped early. asha: those outside the best 1/reduction at a rung, a number
    of trained tokens (asynchronous successive halving). median: those worse than the median of
    the others at the same number of tokens. pbt: none for good, but the worst of a population of
    `trials` members give way to copies of the best with other settings (population-based
    training); what is searched must be such that it can change in mid-run. auto: asha for one
    objective that is measured while a run goes on, else none."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """Each rung lies at so many times the tokens of the one before."""
    min_tokens: PositiveInt | None = None
    """The first rung; by default so that three rungs lie before a whole trial's tokens. pbt: from
    one turn to the next; by default a fifth of a whole trial's tokens."""


class StopWhen(Section):
    value: float | None = None
    """A trial's objective is at least this good."""
    trials_without_gain: PositiveInt | None = None
    """So many trials ended one after the other without a better one."""
    tokens: PositiveInt | None = None
    """So many tokens are trained, over all trials."""


class Retrain(Section):
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0, 1, 2]
    """The best recipe is run once more with each of them."""
    data: Literal["train", "all"] = "all"
    """all: the held-out rows are trained on too, and nothing is measured. train: as in a trial."""


Search = dict[str, Distribution]


class Sweep(Section):
    """Many runs of one recipe with different settings."""

    name: Name
    """The sweep's name, formed like a run's. Its folder is <storage>/<name>."""
    recipe: str | dict[str, Any]
    """The base recipe: a file (relative to the sweep's folder), or the settings themselves."""
    set: dict[str, Any] = {}
    """Changes of the base recipe for all trials, by dotted key."""
    search: Literal["default"] | Annotated[Search, Field(min_length=1)] = "default"
    """What is searched, by dotted key of the recipe. default: learning rate and adapter, around
    what is good for a model of this size."""
    trials: PositiveInt = 30
    time_budget: Seconds | None = None
    """Seconds, or text such as 90m or 8h, over all attempts; what runs then is stopped."""
    objective: Annotated[list[Objective], Field(min_length=1), BeforeValidator(_as_objectives)] = [
        Objective(metric="eval_loss")
    ]
    """One metric, or several: then the sweep looks for the Pareto front."""
    concurrency: Literal["auto"] | PositiveInt = "auto"
    """Trials at a time; auto: as many as the machine or cluster holds."""
    sampler: Literal["tpe", "random", "grid", "cmaes", "gp", "nsga2"] = "tpe"
    """How settings are chosen: tree of Parzen estimators, at random, every combination, CMA-ES,
    Gaussian process, NSGA-II."""
    pruning: Pruning = Pruning()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the sampler; the runs have the recipe's."""
    points: list[dict[str, Any]] = []
    """Settings to try first, after the rule of thumb; keys left out have the recipe's value."""
    warm_start: list[str] = []
    """Folders of earlier sweeps, whose results the sampler starts from."""
    stop_when: StopWhen = StopWhen()
    """Ends the sweep before its trials are used up."""
    retrain: Retrain | None = None
    """Runs with the best settings after the search."""
    storage: str = "runs"
    """Folder (relative to where the command runs) or a URI that all nodes reach."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        metrics = [objective.metric for objective in self.objective]
        if len(set(metrics)) < len(metrics):
            raise ValueError("objective names a metric twice")
        several = len(metrics) > 1
        if self.pruning.kind == "pbt":
            if self.retrain is not None:
                raise ValueError(
                    "retrain runs one recipe, and pruning.kind pbt finds a course of settings; "
                    "leave it out"
                )
            if self.sampler == "grid":
                raise ValueError("sampler grid ends with its last setting; pbt finds new ones")
            if self.trials < 2 or 1 + len(self.points) > self.trials:
                raise ValueError(
                    f"trials: {self.trials} members of a population are too few; pbt needs two, "
                    "and one more than there are points"
                )
        if several and self.pruning.kind not in ("auto", "none"):
            raise ValueError(
                f"pruning.kind {self.pruning.kind} compares one number; with several objectives "
                "leave it out"
            )
        if several and self.sampler == "cmaes":
            raise ValueError("sampler cmaes knows one objective; use tpe, nsga2, gp or random")
        if several and self.stop_when.value is not None:
            raise ValueError("stop_when.value needs a single objective")
        return self


@dataclass(frozen=True)
class LoadedSweep:
    """A valid sweep, its base recipe, and where each of its keys is written."""

    sweep: Sweep
    recipe: Recipe
    document: Document
    folder: Path
    """The sweep file's folder."""

    def place(self, *key: str | int) -> str:
        """file:line of a key of the sweep."""
        return self.document.place(key)


def is_sweep(path: Path) -> bool:
    """Whether a file is a sweep and no recipe, which has no base recipe.

    Raises:
        InputError: it cannot be read.
    """
    return "recipe" in read_recipe_file(path).values


def split_overrides(overrides: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`dotted.key=value` strings of the sweep, and those of its base recipe: recipe.KEY=VALUE."""
    of_recipe = [one for one in overrides if one.startswith(_RECIPE)]
    own = [one for one in overrides if not one.startswith(_RECIPE)]
    return tuple(own), tuple(one.removeprefix(_RECIPE) for one in of_recipe)


def load_sweep(
    path: Path, overrides: tuple[str, ...] = (), recipe_overrides: tuple[str, ...] = ()
) -> LoadedSweep:
    """Read and validate a sweep and its base recipe; all paths become absolute.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` strings for the sweep.
        recipe_overrides: the same for its base recipe, stronger than the sweep's own `set`.

    Raises:
        InputError: with file:line and key of every fault found.
    """
    document = read_recipe_file(path, overrides)
    check_no_secret(document)
    sweep = validate(Sweep, document)
    folder = path.resolve().parent
    sweep = sweep.model_copy(
        update={
            "storage": resolve_path(sweep.storage, Path.cwd()),
            "warm_start": [resolve_path(earlier, Path.cwd()) for earlier in sweep.warm_start],
        }
    )
    recipe = _base_recipe(sweep, document, folder, recipe_overrides)
    return LoadedSweep(sweep, recipe, document, folder)


def _base_recipe(
    sweep: Sweep, document: Document, folder: Path, overrides: tuple[str, ...]
) -> Recipe:
    changes = [
        Change(key, value, f"{document.place(('set', key))}: set")
        for key, value in sweep.set.items()
    ]
    if isinstance(sweep.recipe, str):
        file = Path(resolve_path(sweep.recipe, folder))
        if not file.is_file():
            place = document.place(("recipe",))
            raise InputError(f"{place}: recipe: there is no file {file}")
        return load_recipe(file, [*changes, *overrides])
    inline = document.section("recipe", {"name": sweep.name})
    apply_changes(inline, [*changes, *overrides])
    return resolve_recipe(validate(Recipe, inline), folder)
