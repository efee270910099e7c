"""A sweep checked as far as it can be before Ray is started."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.config.recipe import Recipe
from .default_search import default_space
from .metrics import is_measured_on_the_way, objectives
from .space import Excluded, Settings, Space
from .sweep import LoadedSweep, Sweep
from .sweep_folder import trial_name

CHANGEABLE = (
    *("optim.learning_rate", "optim.weight_decay", "optim.max_grad_norm", "optim.beta1"),
    *("optim.beta2", "adapter.dropout"),
)
"""What may change while a model trains: neither its shape, nor its data, nor what is measured."""


@dataclass(frozen=True)
class Plan:
    """A sweep whose every setting is known to be good, or excluded."""

    sweep: Sweep
    recipe: Recipe
    """The base."""
    folder: Folder
    metrics: Sequence[Metric]
    space: Space
    points: Sequence[Settings]
    """To try first: the rule of thumb, then the user's own."""
    excluded_count: int
    excluded: Sequence[Excluded]
    """Combinations that make no valid recipe, the first ones of them."""
    prunes: bool
    """Whether trials are stopped early."""

    @property
    def is_population(self) -> bool:
        """Whether trials take over the weights of better ones."""
        return self.sweep.pruning.kind == "pbt"

    @property
    def trials(self) -> int:
        """Trials at most: a grid has an end of its own."""
        every = self.space.every_setting()
        most = len(every) if every is not None else self.sweep.trials
        return min(self.sweep.trials, most)

    def data_recipes(self) -> dict[str, Recipe]:
        """A recipe for each data setting, by the setting's key; trials share what it prepares."""
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
        InputError: for everything that is wrong with it.
    """
    sweep, recipe = loaded.sweep, loaded.recipe
    metrics = objectives(loaded)
    search = default_space(recipe) if sweep.search == "default" else sweep.search
    space = Space(search, recipe, loaded.folder, lambda key: loaded.place("search", key))
    if not space.searched:
        raise InputError(
            f"{loaded.place('search')}: search: every value is computed, none searched"
        )
    if sweep.pruning.kind == "pbt":
        _check_changeable(loaded, space)
    count, excluded = space.excluded()
    space.data_settings()
    points = [space.rule_of_thumb()]
    for number, given in enumerate(sweep.points):
        points.append(space.point(given, f"{loaded.place('points', number)}: points.{number}"))
    if sweep.search == "default" and not sweep.warm_start:
        points += space.around_the_rule()[: max(0, sweep.trials - len(points))]
    if sweep.sampler == "grid":
        points += _grid(loaded, space)
    return Plan(
        *(sweep, recipe, Folder(sweep.storage) / sweep.name, metrics, space, points),
        *(count, excluded, _prunes(loaded, metrics)),
    )


def _grid(loaded: LoadedSweep, space: Space) -> list[Settings]:
    settings = space.every_setting()
    if settings is None:
        endless = [key for key in space.searched if space[key].every_value() is None]
        raise InputError(
            f"{loaded.place('sampler')}: sampler grid needs countable values, and "
            f"{', '.join(endless)} has a range of them; use choice, int_uniform or step"
        )
    return settings


def _prunes(loaded: LoadedSweep, metrics: Sequence[Metric]) -> bool:
    kind = loaded.sweep.pruning.kind
    possible = len(metrics) == 1 and is_measured_on_the_way(metrics[0].name, loaded.recipe)
    if kind not in ("auto", "none") and not possible:
        raise InputError(
            f"{loaded.place('pruning')}: pruning.kind {kind}: {metrics[0].name} is known at a "
            "trial's end only, too late to stop it; leave pruning out"
        )
    return possible and kind not in ("none", "pbt")


def _check_changeable(loaded: LoadedSweep, space: Space) -> None:
    for key in space.keys:
        if key not in CHANGEABLE:
            raise InputError(
                f"{loaded.place('search', key)}: search.{key}: with pruning.kind pbt a trial goes "
                f"on from another's weights, so only {', '.join(CHANGEABLE)} can be searched"
            )
