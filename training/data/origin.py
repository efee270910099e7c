"""The origin of a step's rows: their places in the user's source files."""

from ..config.recipe import Recipe
from .prepared import Manifest, Prepared
from .stream import Slice

Origins = dict[str, list[int]]
"""Row numbers by source path, counted from 1 with bad rows. For a JSON Lines file without blank
lines these are its line numbers."""

_SHOWN = 20


def rows_of_step(recipe: Recipe, prepared: Prepared, step: int) -> Origins:
    """The source rows that all workers together use in an optimizer step (counted from 1)."""
    at = (step - 1) // recipe.method.repeats
    whole = Slice(
        folder=prepared.files,
        split=prepared.manifest.train,
        seed=recipe.seed,
        batch_size=recipe.rows_per_step,
        rank=0,
        world_size=1,
        start_step=at,
        stop_step=at + 1,
    )
    numbers = {
        number
        for window in whole.windows()
        for rows in whole.read(window)["rows"].to_pylist()
        for number in rows
    }
    return _by_source(sorted(numbers), prepared.manifest)


def _by_source(numbers: list[int], manifest: Manifest) -> Origins:
    origins: Origins = {}
    first = 0
    for source in manifest.sources:
        if source.split == "train":
            last = first + source.rows
            rows = [number - first + 1 for number in numbers if first <= number < last]
            if rows:
                origins[source.path] = origins.get(source.path, []) + rows
            first = last
    return origins


def describe(origins: Origins) -> str:
    """The origins as text for a message: rows 3, 17 and 5 more of /data/chat.jsonl."""
    return "; ".join(
        f"rows {', '.join(map(str, rows[:_SHOWN]))}"
        + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        + f" of {path}"
        for path, rows in origins.items()
    )
