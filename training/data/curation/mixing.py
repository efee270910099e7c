"""The weights of sources, from their sizes and a temperature."""

from collections.abc import Sequence

from ...config.recipe import Recipe
from ..resolve import ResolvedData


def weights_of(recipe: Recipe, data: ResolvedData, rows: Sequence[int]) -> list[float]:
    """How often the rows of each training source are used.

    Args:
        recipe: the recipe.
        data: its sources.
        rows: number of rows of each training source that are left.
    """
    mix = recipe.data.mix
    if mix is None:
        return [source.weight for source in data.train]
    return mixed_weights(rows, mix.temperature)


def mixed_weights(rows: Sequence[int], temperature: float) -> list[float]:
    """How often each source's rows are used: their shares are in proportion to n^temperature, and
    their total stays.

    Args:
        rows: number of rows of each source; at least one has some.
        temperature: in [0, 1].
    """
    shares = [size**temperature if size else 0.0 for size in rows]
    total, whole = sum(rows), sum(shares)
    return [
        round(share / whole * total / size, 6) if size else 1.0
        for share, size in zip(shares, rows, strict=True)
    ]
