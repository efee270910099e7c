"""The sweep file: a base recipe and a search space, validated before anything is started.

`load_sweep` reads a YAML file; `Sweep` is what the rest of `tuning` receives.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..training.common.errors import InputError
from ..training.common.formatting import shown
from ..training.config.default_storage import check_storage_kind, settle_storage
from ..training.config.paths import is_file, resolve_path
from ..training.config.places import PlacedSection, about
from ..training.config.recipe import (
    Recipe,
    build_recipe,
    check_no_secret,
    load_recipe,
    resolve_recipe,
)
from ..training.config.section import PositiveInt, Section
from ..training.config.sections import Name
from ..training.config.short_forms import write_out
from ..training.config.validation import validate
from ..training.config.yaml_file import (
    Change,
    Document,
    apply_changes,
    read_recipe_file,
    read_settings,
)
from .distribution import Distribution

_RECIPE = "recipe."
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _to_seconds(value: Any) -> Any:
    """Convert text such as 90s, 30m, 1.5h or 2d to seconds; other values stay unchanged.

    Raises:
        ValueError: the text is neither a number nor a duration.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", value.replace(" ", ""))
    if match is None:
        raise ValueError(
            f"expected seconds, or text such as 90s, 30m, 1.5h or 2d, found {shown(value)}"
        )
    return float(match[1]) * _UNITS.get(match[2], 1)


Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)? *[smhd]$")]
Seconds = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_to_seconds, json_schema_input_type=Annotated[float, Field(gt=0)] | Duration),
]


class Objective(Section):
    """A metric to optimise."""

    metric: str
    """A metric that the run reports, such as eval_loss, adapter_bytes or trainable_parameters."""
    mode: Literal["min", "max"] | None = None
    """min if less is better, max if more is; left out: as it is for the metric."""


def _as_objectives(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"metric": item} if isinstance(item, str) else item for item in items]


Objectives = Annotated[
    list[Objective],
    Field(min_length=1),
    BeforeValidator(
        _as_objectives,
        json_schema_input_type=str
        | Objective
        | Annotated[list[str | Objective], Field(min_length=1)],
    ),
]


class Pruning(Section):
    """Which trials end before their last step."""

    kind: Literal["auto", "asha", "median", "pbt", "none"] = "auto"
    """Which trials are stopped early. asha: those outside the best 1/reduction at a rung, a number
    of trained tokens (asynchronous successive halving). median: those worse than the median of
    the others at the same number of tokens. pbt: population-based training, where the worst of
    `trials` members are replaced by copies of the best with other settings; only keys that can
    change during a run can be searched. auto: asha for one objective that is measured during
    training, else none."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """Factor between the tokens of one rung and those of the next."""
    min_tokens: PositiveInt | None = None
    """Tokens at the first rung; by default so that three rungs lie before a trial's end. pbt:
    tokens of one generation; by default a fifth of a whole trial's tokens."""


class StopWhen(Section):
    """Conditions, any of which ends the sweep."""

    value: float | None = None
    """Stop when a trial's objective is at least this good."""
    trials_without_gain: PositiveInt | None = None
    """Stop when this many trials in a row ended without an improvement."""
    tokens: PositiveInt | None = None
    """Stop when all trials together have trained this many tokens."""


class Retrain(Section):
    """Runs of the best settings after the search."""

    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0, 1, 2]
    """The best recipe is trained again with each of these seeds."""
    data: Literal["train", "all"] = "all"
    """all: train on the held-out rows too, without evaluation. train: the same data as a trial."""


Search = dict[str, Distribution]


class Sweep(PlacedSection):
    """Many runs of one recipe with different settings."""

    name: Name
    """The sweep's name, with the same rules as a run's. Its folder is <storage>/<name>."""
    recipe: str | dict[str, Any]
    """The base recipe: a file (relative to the sweep's folder), or the settings themselves."""
    set: dict[str, Any] = {}
    """Changes to the base recipe for all trials, by dotted key."""
    search: Literal["default"] | Annotated[Search, Field(min_length=1)] = "default"
    """Distributions by dotted key of the recipe. default: learning rate and adapter, around values
    that are good for a model of this size."""
    trials: PositiveInt = 30
    """Number of trials; with pruning.kind pbt, of members of the population."""
    time_budget: Seconds | None = None
    """Seconds, or text such as 90m or 8h, over all attempts; then running trials are stopped."""
    objective: Objectives = []
    """One metric; or several, for which the sweep searches the Pareto front. Left out: the metric
    that the recipe's method watches, such as eval_loss, eval_reward or eval_reward_accuracy."""
    concurrency: Literal["auto"] | PositiveInt = "auto"
    """Number of trials at the same time; auto: as many as fit on the machine or cluster."""
    sampler: Literal["tpe", "random", "grid", "cmaes", "gp", "nsga2"] = "tpe"
    """How settings are chosen: tree of Parzen estimators, at random, every combination, CMA-ES,
    Gaussian process, NSGA-II."""
    pruning: Pruning = Pruning()
    """Early end of weak trials."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler; the trials use the recipe's seed."""
    points: list[dict[str, Any]] = []
    """Settings to try after the rule of thumb; keys that are left out have the recipe's value."""
    warm_start: list[str] = []
    """Folders of earlier sweeps; the sampler starts with their results."""
    stop_when: StopWhen = StopWhen()
    """Conditions that end the sweep before all its trials have run."""
    retrain: Retrain | None = None
    """Training with the best settings after the search."""
    storage: str = "runs"
    """Folder (relative to where the command runs) or a URI that all nodes reach. Where it is not
    set, the environment variable FINRAY_STORAGE decides."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        metrics = [objective.metric for objective in self.objective]
        if len(set(metrics)) < len(metrics):
            raise ValueError("objective contains the same metric twice; remove one of them")
        several = len(metrics) > 1
        if self.pruning.kind == "pbt":
            if self.retrain is not None:
                raise ValueError(
                    "retrain needs a single recipe, but with pruning.kind pbt settings change "
                    "during training; remove retrain"
                )
            if self.sampler == "grid":
                raise ValueError("sampler grid cannot be combined with pruning.kind pbt; use tpe")
            if self.trials < 2 or 1 + len(self.points) > self.trials:
                raise ValueError(
                    f"trials: {self.trials} is too small for a population; pbt needs at least two "
                    "members, and one more than there are points; raise it"
                )
        if several and self.pruning.kind not in ("auto", "none"):
            raise ValueError(
                f"pruning.kind {self.pruning.kind} needs a single objective; remove pruning, or "
                "all objectives but one"
            )
        if several and self.sampler == "cmaes":
            raise ValueError("sampler cmaes needs a single objective; use tpe, nsga2, gp or random")
        if several and self.stop_when.value is not None:
            raise ValueError("stop_when.value needs a single objective; remove it")
        return self


@dataclass(frozen=True)
class LoadedSweep:
    """A valid sweep, its base recipe, and the place of each key in the file."""

    sweep: Sweep
    """The sweep, which names its objective."""
    recipe: Recipe
    document: Document
    folder: Path
    """The sweep file's folder; the current one for settings without a file."""

    @property
    def names_objective(self) -> bool:
        """False if the objective is the method's watched metric because the file names none."""
        return "objective" in self.document.values

    def place(self, *key: str | int) -> str:
        """file:line of a key of the sweep."""
        return self.document.place(key)


def is_sweep(source: Path | Mapping[str, Any]) -> bool:
    """True if a file or mapping is a sweep: it has the key `recipe`, which recipes do not have.

    Raises:
        InputError: the file cannot be read.
    """
    return "recipe" in (read_recipe_file(source).values if isinstance(source, Path) else source)


def split_overrides(
    overrides: Sequence[str | Change],
) -> tuple[list[str | Change], list[str | Change]]:
    """Split changes into those of the sweep and, without their prefix, those of `recipe.`."""
    of_sweep: list[str | Change] = []
    of_recipe: list[str | Change] = []
    for override in overrides:
        key = override if isinstance(override, str) else override.key
        if not key.startswith(_RECIPE):
            of_sweep.append(override)
        elif isinstance(override, str):
            of_recipe.append(override.removeprefix(_RECIPE))
        else:
            of_recipe.append(replace(override, key=key.removeprefix(_RECIPE)))
    return of_sweep, of_recipe


def load_sweep(
    source: Path | Mapping[str, Any],
    overrides: Sequence[str | Change] = (),
    recipe_overrides: Sequence[str | Change] = (),
) -> LoadedSweep:
    """Read and validate a sweep and its base recipe; all paths become absolute.

    Args:
        source: the YAML file, or the settings.
        overrides: changes of the sweep, or `dotted.key=value` strings.
        recipe_overrides: the same for its base recipe; they override the sweep's `set`.

    Raises:
        InputError: with file:line and key of every error.
    """
    document, folder = read_settings(source, overrides)
    settle_storage(document)
    check_no_secret(document)
    check_storage_kind(document)
    sweep = validate(Sweep, document).with_places(document.places)
    with sweep.locating(), about("storage"):
        storage = resolve_path(sweep.storage, Path.cwd())
    with sweep.locating(), about("warm_start"):
        earlier = [resolve_path(each, Path.cwd()) for each in sweep.warm_start]
    sweep = sweep.model_copy(update={"storage": storage, "warm_start": earlier})
    recipe = _base_recipe(sweep, document, folder, recipe_overrides)
    if not sweep.objective:
        watched = Objective(metric=recipe.watched.name)
        sweep = sweep.model_copy(update={"objective": [watched]})
    return LoadedSweep(sweep, recipe, document, folder)


def _base_recipe(
    sweep: Sweep, document: Document, folder: Path, overrides: Sequence[str | Change]
) -> Recipe:
    changes = [
        Change(key, value, f"{document.place(('set', key))}: set")
        for key, value in sweep.set.items()
    ]
    if isinstance(sweep.recipe, str):
        with sweep.locating(), about("recipe"):
            file = Path(resolve_path(sweep.recipe, folder))
        if not is_file(file):
            place = document.place(("recipe",))
            raise InputError(f"{place}: recipe: the file {file} does not exist; correct the path")
        return load_recipe(file, [*changes, *overrides])
    inline = document.section("recipe", {"name": sweep.name}, write_out)
    apply_changes(inline, [*changes, *overrides])
    settle_storage(inline)
    check_no_secret(inline)
    check_storage_kind(inline)
    return resolve_recipe(build_recipe(inline), folder)
