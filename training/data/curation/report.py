"""What curation takes of a recipe's rows, without preparing them."""

import uuid
from collections.abc import Sequence
from typing import Any

from ...common.errors import InputError
from ...common.formatting import one_line
from ...common.progress import Progress
from ...common.storage import Folder
from ...config.recipe import Recipe
from ..prepare import Windows
from ..resolve import ResolvedData, identified_data
from ..tasks import RunTasks
from .curate import Curated, curate
from .files import held_in
from .funnel import SAMPLES
from .mixing import weights_of
from .samples import without_personal_data
from .scoring import OpenScorer

_SHOWN = 3


def report_of(
    recipe: Recipe,
    folder: Folder,
    run_tasks: RunTasks,
    progress: Progress,
    open_scorer: OpenScorer | None = None,
) -> dict[str, Any]:
    """Take the training rows through the recipe's stages; of data that streams, the first window.

    Args:
        recipe: the recipe.
        folder: <storage>/prepared.
        run_tasks: runs the tasks, in this process or on Ray.
        progress: receives a status after every finished task.
        open_scorer: opens the reward model of a stage that has one.

    Returns:
        name, funnel, bad_rows (place and reason of the first that cannot be used), sources (path,
        rows, left, weight, share), held_out: the number of rows, or None without groups of held-out
        rows, and windows: their number if the data streams.

    Raises:
        InputError: the recipe has no stages; see `curate`.
    """
    if not recipe.data.is_curated:
        raise InputError(
            "data.curate: the recipe has no stages; add some, such as [normalise, deduplicate]"
        )

    def check(bad: Sequence[dict[str, Any]], count: int, rows: int) -> None:
        if count > recipe.data.max_bad_rows * rows:
            first = "\n".join(f"  {e['file']}:{e['line']}: {e['reason']}" for e in bad[:_SHOWN])
            raise InputError(
                f"data.max_bad_rows allows {recipe.data.max_bad_rows:.1%}, and {count} of {rows} "
                f"rows cannot be used; correct them, or raise the limit. The first ones:\n{first}"
            )

    data = identified_data(recipe)
    part = Windows(recipe, data).part(0) if recipe.data.streams else None
    home, window = (folder, None) if part is None else (folder / uuid.uuid4().hex, part.curation)
    try:
        curated = curate(
            *(recipe, data, home, run_tasks, progress, check, open_scorer), window=window
        )
        return {
            "name": recipe.name,
            "funnel": list(curated.funnel),
            "bad_rows": _bad_rows(recipe, curated),
            "sources": _sources(recipe, data, curated),
            "held_out": _held_out(curated),
            "windows": None if part is None else part.windows,
        }
    finally:
        if part is not None:
            home.delete()


def _bad_rows(recipe: Recipe, curated: Curated) -> list[dict[str, Any]]:
    """Places of the first rows that cannot be used, and why; a reason may quote the row."""
    is_redacted = any(stage.kind == "redact" for stage in recipe.data.curate)
    shown = without_personal_data if is_redacted else str
    return [
        {"place": f"{one_line(bad['file'])}:{bad['line']}", "reason": shown(bad["reason"])}
        for bad in curated.bad[:SAMPLES]
    ]


def _sources(recipe: Recipe, data: ResolvedData, curated: Curated) -> list[dict[str, Any]]:
    weights = weights_of(recipe, data, curated.left_rows)
    used = [weight * left for weight, left in zip(weights, curated.left_rows, strict=True)]
    all_used = sum(used) or 1.0  # a window may lose all of its rows
    rows = [0] * len(used)
    for chunk, counts in zip(curated.chunks, curated.counts, strict=True):
        rows[chunk.source] += counts.rows
    return [
        {
            "path": source.path,
            "rows": rows[n],
            "left": curated.left_rows[n],
            "weight": weights[n],
            "share": round(used[n] / all_used, 6),
        }
        for n, source in enumerate(data.train)
    ]


def _held_out(curated: Curated) -> int | None:
    if curated.held is None:
        return None
    return sum(sum(held_in(curated.held, chunk.number).values()) for chunk in curated.chunks)
