"""The checks of a sweep that need neither Ray nor torch, and the plan that results from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.config.recipe import Recipe
from .combinations import Combinations, Excluded
from .default_search import default_space
from .distribution import Settings
from .metrics import check_reported, is_measured_during_training, objectives
from .space import Space
from .sweep import LoadedSweep, Sweep
from .sweep_folder import STUDY_FILE, read_earlier, trial_name

CHANGEABLE = (
    *("optim.learning_rate", "optim.weight_decay", "optim.max_grad_norm", "optim.beta1"),
    *("optim.beta2", "adapter.dropout"),
)
"""Keys that may change during training: they affect neither the model's shape, nor the data, nor
what is measured."""
_PACKAGES = {"cmaes": "cmaes", "gp": "scipy"}
"""Samplers that need a package of their own."""


@dataclass(frozen=True)
class Plan:
    """A checked sweep: every combination of settings is valid, or excluded."""

    sweep: Sweep
    recipe: Recipe
    """The base recipe."""
    folder: Folder
    metrics: Sequence[Metric]
    space: Space
    combinations: Combinations
    """Those of the space."""
    points: Sequence[Settings]
    """Settings of the first trials: the rule of thumb, then the user's own."""
    excluded_count: int
    excluded: Sequence[Excluded]
    """The first of the combinations that are not valid recipes."""
    prunes: bool
    """True if trials are stopped early by their metric."""
    place: Callable[..., str]
    """Returns file:line of a key of the sweep."""

    @property
    def is_population(self) -> bool:
        """True for population-based training, where trials take over the weights of better ones."""
        return self.sweep.pruning.kind == "pbt"

    def trial_recipe(self, settings: Settings) -> Recipe:
        """The recipe of a trial, in the sweep's storage.

        Raises:
            InputError: the settings are not a valid recipe.
        """
        return self.space.recipe(settings, name=trial_name(0), storage=self.sweep.storage)

    def data_recipes(self) -> dict[str, Recipe]:
        """A recipe for each prepared data set that trials share, by `Combinations.data_key`."""
        return {
            self.combinations.data_key(settings): self.trial_recipe(settings)
            for settings in self.combinations.data_settings()
        }


def make_plan(loaded: LoadedSweep) -> Plan:
    """Check a loaded sweep.

    Raises:
        InputError: with file:line and key of what is wrong.
    """
    sweep, recipe = loaded.sweep, loaded.recipe
    folder = Folder(sweep.storage) / sweep.name
    metrics = objectives(loaded)
    _check_sampler(loaded)
    search = default_space(recipe) if sweep.search == "default" else sweep.search
    space = Space(
        *(search, recipe, loaded.folder, lambda key: loaded.place("search", key)),
        lambda changed: check_reported(metrics, changed),
    )
    if not space.searched:
        raise InputError(
            f"{loaded.place('search')}: search: every key is computed with times, so none is "
            "searched; give at least one a choice or a range"
        )
    if recipe.data.streams or "data.prepare" in space.searched:
        raise InputError(
            f"{loaded.place('recipe')}: recipe: data.prepare streaming prepares the data of one "
            "run, and trials share it; prepare ahead"
        )
    if sweep.pruning.kind == "pbt":
        _check_changeable(loaded, space)
    combinations = Combinations(space)
    count, excluded = combinations.excluded()
    combinations.data_settings()
    if sweep.sampler == "grid":
        _check_grid(loaded, space, combinations)
    # A sweep that was started before has their results in its own study.
    if sweep.warm_start and not folder.exists(STUDY_FILE):
        _check_warm_start(loaded, metrics)
    points = _points(loaded, space)
    return Plan(
        *(sweep, recipe, folder, metrics, space, combinations, points),
        *(count, excluded, _prunes(loaded, metrics), loaded.place),
    )


def _points(loaded: LoadedSweep, space: Space) -> list[Settings]:
    sweep = loaded.sweep
    points = [space.rule_of_thumb()]
    for number, given in enumerate(sweep.points):
        points.append(space.point(given, f"{loaded.place('points', number)}: points.{number}"))
    if sweep.search == "default" and not sweep.warm_start:
        points += space.variations_of_the_rule()[: max(0, sweep.trials - len(points))]
    return points


def _check_sampler(loaded: LoadedSweep) -> None:
    sampler = loaded.sweep.sampler
    package = _PACKAGES.get(sampler)
    if package is not None and find_spec(package) is None:
        raise InputError(
            f"{loaded.place('sampler')}: sampler: {sampler} needs the package {package}; install "
            "finray[search], or use sampler: tpe"
        )


def _check_grid(loaded: LoadedSweep, space: Space, combinations: Combinations) -> None:
    if combinations.every_setting() is not None:
        return
    place = f"{loaded.place('sampler')}: sampler grid needs"
    uncountable = [key for key in space.searched if space[key].every_value() is None]
    if uncountable:
        raise InputError(
            f"{place} a finite number of values, and {', '.join(uncountable)} has a continuous "
            "range; use choice, int_uniform or step"
        )
    raise InputError(f"{place} a smaller space than this one; use random, or search fewer values")


def _check_warm_start(loaded: LoadedSweep, metrics: Sequence[Metric]) -> None:
    for number, uri in enumerate(loaded.sweep.warm_start):
        try:
            folder = Folder(uri)
            folder.require_folder()
            read_earlier(folder, metrics)
        except InputError as error:
            place = loaded.place("warm_start", number)
            raise InputError(f"{place}: warm_start.{number}: {error}") from None


def _prunes(loaded: LoadedSweep, metrics: Sequence[Metric]) -> bool:
    kind = loaded.sweep.pruning.kind
    possible = len(metrics) == 1 and is_measured_during_training(metrics[0].name, loaded.recipe)
    if kind not in ("auto", "none") and not possible:
        raise InputError(
            f"{loaded.place('pruning')}: pruning.kind {kind}: it needs one objective that tells "
            f"trials apart during training, and {metrics[0].name} is only known at a trial's end; "
            "remove pruning"
        )
    return possible and kind not in ("none", "pbt")


def _check_changeable(loaded: LoadedSweep, space: Space) -> None:
    for key in space.keys:
        if key not in CHANGEABLE:
            raise InputError(
                f"{loaded.place('search', key)}: search.{key}: with pruning.kind pbt a trial "
                f"continues from another's weights, so only {', '.join(CHANGEABLE)} can be "
                "searched; remove this key"
            )
