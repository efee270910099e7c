"""Where the rows of a step come from, in the files that the user gave."""

from ..config.recipe import Recipe
from .prepared import Manifest, Prepared
from .stream import Slice

Origins = dict[str, list[int]]
"""Rows by source: their numbers in it, from 1; bad rows count. Of a JSON Lines file without blank
lines these are its lines."""

_SHOWN = 20


def rows_of_step(recipe: Recipe, prepared: Prepared, step: int) -> Origins:
    """The source rows that an optimizer step (counted from 1) learns from, on all workers."""
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
    found: Origins = {}
    first = 0
    for source in manifest.sources:
        if source.split == "train":
            last = first + source.rows
            rows = [number - first + 1 for number in numbers if first <= number < last]
            if rows:
                found[source.path] = found.get(source.path, []) + rows
            first = last
    return found


def describe(origins: Origins) -> str:
    """For a message: rows 3, 17 and 5 more of /data/chat.jsonl."""
    return "; ".join(
        f"rows {', '.join(map(str, rows[:_SHOWN]))}"
        + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        + f" of {path}"
        for path, rows in origins.items()
    )
