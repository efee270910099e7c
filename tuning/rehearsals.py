"""The rehearsals of a sweep's trials, and the data that each of them trains on.

Trials whose settings differ in numbers alone share a rehearsal (`rehearsal/key`), and trials of the
same data setting share prepared data.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from ..training.common.errors import InputError
from ..training.common.progress import Progress
from ..training.config.model_folder import model_folder
from ..training.config.recipe import Recipe
from ..training.data.prepared import Prepared
from ..training.rehearsal.child import rehearse_all
from ..training.rehearsal.key import key_of
from ..training.rehearsal.outcome import Outcome
from ..training.run import prepare_data
from .combinations import Combinations
from .distribution import Settings

_SECTIONS = ("model", "adapter", "freeze", "method", "data")
"""Sections of a recipe on which its rehearsal depends."""
_LOOKED_AT = 256
"""Settings whose rehearsals are compared before the first trial."""
_BEFORE = 16
"""Rehearsals before the first trial; further ones wait until a trial needs them."""


class Refused(InputError):
    """A trial would fail before its first step."""


@dataclass(frozen=True)
class Ready:
    """What a trial needs before it takes a slot."""

    prepared: Prepared
    outcome: Outcome


class Rehearsals:
    """Rehearses each kind of trial once, and prepares the data of each.

    Args:
        combinations: those of what is searched.
        recipe_of: the recipe of a trial with these settings, at the sweep's commits.
        progress: receives what is done, and once each line that an outcome has.
    """

    def __init__(
        self,
        combinations: Combinations,
        recipe_of: Callable[[Settings], Recipe],
        progress: Progress,
    ) -> None:
        self._combinations = combinations
        self._recipe_of = recipe_of
        self._progress = progress
        self._outcomes: dict[str, Outcome] = {}
        self._prepared: dict[tuple[str, bool], Prepared] = {}
        self._refused: dict[tuple[str, str], str] = {}
        self._lines: set[str] = set()

    def start(self, points: Iterable[Settings]) -> None:
        """Rehearse the kinds of trials that are foreseen, in one process, and prepare their data.

        Args:
            points: the settings of the first trials.

        Raises:
            InputError: every trial would fail, or the data cannot be prepared.
        """
        kinds = self._foreseen(points)
        recipes = {key: recipe for (_, key), (_, recipe) in kinds.items()}
        self._outcomes |= rehearse_all(recipes, self._progress)
        refusals = []
        for settings, _ in kinds.values():
            try:
                self._ready(settings)
            except Refused as error:
                refusals.append(str(error))
        if len(refusals) == len(kinds):
            raise InputError(refusals[0])

    @property
    def prepared(self) -> list[Prepared]:
        """All data that is prepared so far; at least one set after `start`."""
        return list(self._prepared.values())

    @property
    def refusals(self) -> set[str]:
        """The messages of all refused trials."""
        return set(self._refused.values())

    def ready(self, settings: Settings) -> Ready:
        """What a trial with these settings needs.

        Raises:
            Refused: it would fail.
            InputError: its data cannot be prepared.
        """
        try:
            return self._ready(settings)
        except Refused as error:
            self._refused[self._kind(settings, self._recipe_of(settings))] = str(error)
            raise

    def refusal(self, settings: Settings) -> str | None:
        """Why another trial like one that was refused must not run; None if it may."""
        if not self._refused:
            return None
        return self._refused.get(self._kind(settings, self._recipe_of(settings)))

    def _ready(self, settings: Settings) -> Ready:
        recipe = self._recipe_of(settings)
        data, key = self._kind(settings, recipe)
        if key not in self._outcomes:
            self._outcomes |= rehearse_all({key: recipe}, self._progress)
        outcome = self._outcomes[key]
        try:
            decided = outcome.settle(recipe)
        except InputError as error:
            raise Refused(str(error)) from error
        if (data, decided.packs) not in self._prepared:
            self._prepared[data, decided.packs] = prepare_data(decided, self._progress)
        for line in outcome.lines(decided):
            if line not in self._lines:
                self._lines.add(line)
                self._progress.note(line)
        return Ready(self._prepared[data, decided.packs], outcome)

    def _foreseen(
        self, points: Iterable[Settings]
    ) -> dict[tuple[str, str], tuple[Settings, Recipe]]:
        """Settings and recipe of each kind of trial; of all data settings, and some others."""
        kinds: dict[tuple[str, str], tuple[Settings, Recipe]] = {}
        for settings in (*self._combinations.data_settings(), *points):
            recipe = self._recipe_of(settings)
            kinds.setdefault(self._kind(settings, recipe), (settings, recipe))
        for settings in islice(self._combinations.varied(_SECTIONS), _LOOKED_AT):
            try:
                recipe = self._recipe_of(settings)
            except InputError:  # no valid recipe
                continue
            kind = self._kind(settings, recipe)
            if kind in kinds or len(kinds) < _BEFORE:
                kinds.setdefault(kind, (settings, recipe))
        return kinds

    def _kind(self, settings: Settings, recipe: Recipe) -> tuple[str, str]:
        """What trials have in common that share prepared data and a rehearsal."""
        folder = model_folder(recipe.model)
        assert folder is not None, "None stands for a model that only the hub has"
        return self._combinations.data_key(settings), key_of(recipe, folder)
