"""The frozen base of a run, kept for the next run of the same process.

A sweep's trials train adapters on the same base, one after the other. PEFT removes an adapter
without a trace, and the base is frozen, so the next trial gets it unchanged.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe
from ..records.identity import identity_of_base

if TYPE_CHECKING:
    from peft import PeftModel

Measures = dict[str, float]


class BaseCache:
    """Holds one base at a time, and the measures of bases before training."""

    def __init__(self) -> None:
        self._cached: tuple[str, PeftModel] | None = None
        self._measured: dict[str, Measures] = {}

    def take(self, recipe: Recipe) -> Any | None:
        """Remove the base; returns it without an adapter, or None if the recipe has another."""
        cached, self._cached = self._cached, None  # two bases may not fit into memory
        if cached is None or cached[0] != _key(recipe):
            return None
        return cached[1].unload()

    def put(self, recipe: Recipe, model: "PeftModel") -> None:
        """Keep the base under a new adapter for the next run, unless the adapter changes it."""
        if _leaves_base(recipe):
            self._cached = _key(recipe), model

    def measured(self, recipe: Recipe, prepared: str, measure: Callable[[], Measures]) -> Measures:
        """The measures before the first step, computed once for each base and data set.

        Args:
            recipe: the run's recipe.
            prepared: fingerprint of the run's data.
            measure: computes the measures.
        """
        if not _leaves_base(recipe):
            return measure()
        # The seed counts, as online methods sample what they measure.
        key = f"{_key(recipe)} {recipe.method.model_dump_json()} {recipe.seed} {prepared}"
        if key not in self._measured:
            self._measured[key] = measure()
        return dict(self._measured[key])


def _leaves_base(recipe: Recipe) -> bool:
    """True if a new adapter changes neither the base's weights nor its outputs."""
    adapter = recipe.adapter
    return (
        adapter is not None
        and adapter.init in ("default", "gaussian", "orthogonal")
        and not adapter.modules_to_save
    )


def _key(recipe: Recipe) -> str:
    """The base's settings and files: a folder may have changed since the last run."""
    return json.dumps([recipe.model.model_dump(mode="json"), identity_of_base(recipe)])
