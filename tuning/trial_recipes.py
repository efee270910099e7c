"""From settings to the recipe of a trial."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.common.errors import InputError
from ..training.config.recipe import Recipe, build_recipe, resolve_recipe
from ..training.config.short_forms import write_out
from ..training.config.user_code import functions_in, with_texts
from ..training.config.yaml_file import Change, Document, apply_changes
from .distribution import Settings


class TrialRecipes:
    """Makes recipes of settings; all of them have the texts of files that were first read.

    Args:
        base: the recipe that each trial changes.
        folder: base folder of relative paths among the values.
        place: returns file:line of a searched key, for messages.
        check: raises an InputError for a valid recipe that a trial must not have.
    """

    def __init__(
        self,
        base: Recipe,
        folder: Path,
        place: Callable[[str], str],
        check: Callable[[Recipe], None],
    ) -> None:
        self._base = base
        self._folder = folder
        self._place = place
        self._check = check
        self._values = base.model_dump(mode="json", exclude_unset=True)
        # `kind` selects the section's class, so it must be present also if it is the default.
        self._values["method"] = {"kind": base.method.kind, **self._values.get("method", {})}
        self._texts: dict[str, str] = {}
        self._templates: dict[str | None, str | None] = {}
        self._note_texts(base)

    def recipe(self, settings: Settings, **fixed: Any) -> Recipe:
        """The recipe with these settings; a file of code, and a chat template's, has the text that
        was first read of it.

        Args:
            settings: values by dotted key.
            fixed: further top-level values, such as the name.

        Raises:
            InputError: the settings are not a valid recipe.
        """
        valid = with_texts(self._validated(settings, fixed), self._texts, self._folder)
        template = valid.data.chat_template
        data = valid.data.model_copy(
            update={"chat_template": self._templates.get(template, template)}
        )
        recipe = resolve_recipe(valid.model_copy(update={"data": data}), self._folder)
        self._templates.setdefault(template, recipe.data.chat_template)
        self._note_texts(recipe)
        return recipe

    def refusal(self, settings: Settings) -> str | None:
        """Why the settings are not a valid recipe; None if they are."""
        try:
            self._validated(settings, {})
        except InputError as error:
            return str(error)
        return None

    def _validated(self, settings: Settings, fixed: dict[str, Any]) -> Recipe:
        values = {**copy.deepcopy(self._values), **fixed}
        places = dict(self._base.places) or {(): "the base recipe"}
        document = Document(values, places, write_out)
        changes = [Change(key, value, self._place(key)) for key, value in settings.items()]
        apply_changes(document, changes)
        recipe = build_recipe(document)
        self._check(recipe)
        return recipe

    def _note_texts(self, recipe: Recipe) -> None:
        for _, function in functions_in(recipe):
            if function.source is not None:
                self._texts.setdefault(function.path, function.source)
