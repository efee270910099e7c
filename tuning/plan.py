"""The checks of a sweep that need neither Ray nor torch, and the plan that results from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.config.recipe import Recipe
from .default_search import default_space
from .metrics import is_measured_during_training, objectives
from .space import Excluded, Settings, Space
from .sweep import LoadedSweep, Sweep
from .sweep_folder import trial_name

CHANGEABLE = (
    *("optim.learning_rate", "optim.weight_decay", "optim.max_grad_norm", "optim.beta1"),
    *("optim.beta2", "adapter.dropout"),
)
"""Keys that may change during training: they affect neither the model's shape, nor the data, nor
what is measured."""


@dataclass(frozen=True)
class Plan:
    """A checked sweep: every combination of settings is valid, or excluded."""

    sweep: Sweep
    recipe: Recipe
    """The base recipe."""
    folder: Folder
    metrics: Sequence[Metric]
    space: Space
    points: Sequence[Settings]
    """Settings of the first trials: the rule of thumb, then the user's own."""
    excluded_count: int
    excluded: Sequence[Excluded]
    """The first of the combinations that are not valid recipes."""
    prunes: bool
    """True if trials are stopped early by their metric."""

    @property
    def is_population(self) -> bool:
        """True for population-based training, where trials take over the weights of better ones."""
        return self.sweep.pruning.kind == "pbt"

    @property
    def trials(self) -> int:
        """Maximum number of trials: a finite space may have fewer settings than `sweep.trials`."""
        every = self.space.every_setting()
        most = len(every) if every is not None else self.sweep.trials
        return min(self.sweep.trials, most)

    def data_recipes(self) -> dict[str, Recipe]:
        """A recipe for each prepared data set that trials share, by `Space.data_key`."""
        space = self.space
        return {
            space.data_key(settings): space.recipe(
                settings, name=trial_name(0), storage=self.sweep.storage
            )
            for settings in space.data_settings()
        }


def make_plan(loaded: LoadedSweep) -> Plan:
    """Check a loaded sweep.

    Raises:
        InputError: with file:line and key of what is wrong.
    """
    sweep, recipe = loaded.sweep, loaded.recipe
    metrics = objectives(loaded)
    search = default_space(recipe) if sweep.search == "default" else sweep.search
    space = Space(search, recipe, loaded.folder, lambda key: loaded.place("search", key))
    if not space.searched:
        raise InputError(
            f"{loaded.place('search')}: search: every key is computed with times, so none is "
            "searched; give at least one a choice or a range"
        )
    if sweep.pruning.kind == "pbt":
        _check_changeable(loaded, space)
    count, excluded = space.excluded()
    space.data_settings()
    points = [space.rule_of_thumb()]
    for number, given in enumerate(sweep.points):
        points.append(space.point(given, f"{loaded.place('points', number)}: points.{number}"))
    if sweep.search == "default" and not sweep.warm_start:
        points += space.variations_of_the_rule()[: max(0, sweep.trials - len(points))]
    if sweep.sampler == "grid":
        points += _grid(loaded, space)
    return Plan(
        *(sweep, recipe, Folder(sweep.storage) / sweep.name, metrics, space, points),
        *(count, excluded, _prunes(loaded, metrics)),
    )


def _grid(loaded: LoadedSweep, space: Space) -> list[Settings]:
    settings = space.every_setting()
    if settings is None:
        uncountable = [key for key in space.searched if space[key].every_value() is None]
        raise InputError(
            f"{loaded.place('sampler')}: sampler grid needs a finite number of values, and "
            f"{', '.join(uncountable)} has a continuous range; use choice, int_uniform or step"
        )
    return settings


def _prunes(loaded: LoadedSweep, metrics: Sequence[Metric]) -> bool:
    kind = loaded.sweep.pruning.kind
    possible = len(metrics) == 1 and is_measured_during_training(metrics[0].name, loaded.recipe)
    if kind not in ("auto", "none") and not possible:
        raise InputError(
            f"{loaded.place('pruning')}: pruning.kind {kind}: it needs one objective that is "
            f"measured during training, and {metrics[0].name} is only known at a trial's end; "
            "remove pruning"
        )
    return possible and kind not in ("none", "pbt")


def _check_changeable(loaded: LoadedSweep, space: Space) -> None:
    for key in space.keys:
        if key not in CHANGEABLE:
            raise InputError(
                f"{loaded.place('search', key)}: search.{key}: with pruning.kind pbt a trial "
                f"continues from another's weights, so only {', '.join(CHANGEABLE)} can be searched"
            )
