"""Divides the rows of an optimizer step into those of its forward passes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from ..config.recipe import Recipe
from .batching import Rows
from .packing import pack
from .stream import Sequence, share


@dataclass(frozen=True)
class Division:
    """How rows are divided: into parts of equally many, or of at most so many tokens."""

    rows: int
    """Rows of a part, if there is no budget."""
    tokens: int | None = None
    """The budget: tokens of a part, padding included. A longer row has a part of its own."""
    is_flat: bool = False
    """Rows are not padded, so that it does not matter which of them share a part."""
    texts: int = 1
    """Texts of a row, each of which has a row of its own in a padded part."""
    keeps_order: bool = False
    """The result depends on which rows share a part, so they do not change places."""
    border: int | None = None
    """Texts of more tokens share no part with others: the model computes them otherwise, and all
    that is beside them."""

    @classmethod
    def of(cls, recipe: Recipe, *, is_flat: bool, packs: bool, border: int | None = None) -> Self:
        """As a recipe asks for.

        Args:
            recipe: the run's recipe.
            is_flat: True if its batches are not padded.
            packs: True if its rows are packed, and therefore full.
            border: the model's, which longer texts pass.
        """
        method = recipe.method
        passes = border is not None and recipe.data.max_length > border
        return cls(
            recipe.microbatch,
            None if packs else recipe.optim.micro_batch_tokens,
            is_flat,
            method.sequences_per_row,
            packs or method.averages_by_pass,
            border if passes and not method.averages_by_pass else None,
        )

    @property
    def varies(self) -> bool:
        """True if the number of parts depends on the rows, and not on how many they are alone."""
        return self.tokens is not None or self.border is not None

    def divided(self, parts: int) -> Self:
        """The same in smaller parts, of at least a row."""
        tokens = None if self.tokens is None else max(1, self.tokens // parts)
        return replace(self, rows=max(1, self.rows // parts), tokens=tokens)

    def parts(self, rows: Rows) -> list[list[int]]:
        """The places of each part's rows.

        Without a budget, only what would be padded changes its order: rows of like length share a
        part. With one, parts have as few free places as possible.
        """
        kinds: list[list[int]] = [[], []]
        for place, row in enumerate(rows):
            kinds[self.passes_border(row)].append(place)
        return [part for kind in kinds if kind for part in self._parts(kind, rows)]

    def _parts(self, places: list[int], rows: Rows) -> list[list[int]]:
        if self.is_flat and self.tokens is not None:
            sizes = np.array([len(rows[place].input_ids) for place in places], np.int32)
            bins = pack(sizes, max(self.tokens, int(sizes.max(initial=0))))
            parts = np.split(np.array(places)[bins.documents], bins.offsets[1:-1])
            return [part.tolist() for part in parts]
        if not (self.is_flat or self.keeps_order):
            places = sorted(places, key=lambda place: -self._longest(rows[place]))
        return list(self._grouped((place, rows[place]) for place in places))

    def split(self, rows: Iterable[Sequence]) -> Iterator[Sequence]:
        """The rows, each with documents on one side of the border."""
        for row in rows:
            passes = row.lengths > (self.border or row.lengths.max())
            if self.texts > 1 or passes.all() or not passes.any():
                yield row
                continue
            for side in (passes, ~passes):
                of_side = np.repeat(side, row.lengths)
                yield replace(
                    row,
                    input_ids=row.input_ids[of_side],
                    lengths=row.lengths[side],
                    trainable=row.trainable[of_side],
                    rows=row.rows[side],
                )

    def sides(self, rows: Rows) -> list[Rows]:
        """The rows of each side of the border, if there is one: equally many parts anywhere."""
        if self.border is None:
            return [rows]
        return [[row for row in rows if self.passes_border(row) == side] for side in (False, True)]

    def in_order(self, rows: Iterator[Sequence]) -> Iterator[Rows]:
        """Parts of rows that follow each other, on either side of the border."""
        held: dict[int, Sequence] = {}

        def noted() -> Iterator[tuple[int, Sequence]]:
            for place, row in enumerate(self.split(rows)):
                held[place] = row
                yield place, row

        for part in self._grouped(noted()):
            yield [held.pop(place) for place in part]

    def _grouped(self, rows: Iterator[tuple[int, Sequence]]) -> Iterator[list[int]]:
        parts = _Part(), _Part()  # of either side of the border
        for place, row in rows:
            part = parts[self.passes_border(row)]
            longest = max(part.longest, self._longest(row))
            total, count = part.total + len(row.input_ids), len(part.places) + 1
            size = total if self.is_flat else count * self.texts * longest
            is_full = count > self.rows if self.tokens is None else size > self.tokens
            if part.places and is_full:
                yield part.places
                part.places, longest, total = [], self._longest(row), len(row.input_ids)
            part.places.append(place)
            part.longest, part.total = longest, total
        yield from (part.places for part in parts if part.places)

    def passes_border(self, row: Sequence) -> bool:
        """True if a text of the row passes the border."""
        return self.border is not None and int(row.lengths.max()) > self.border

    def _longest(self, row: Sequence) -> int:
        """Tokens of the row's longest text; documents that share a row are one."""
        return int(row.lengths.max()) if self.texts > 1 else len(row.input_ids)


@dataclass
class _Part:
    """Rows of a forward pass that may take more."""

    places: list[int] = field(default_factory=list)
    longest: int = 0
    """Tokens of the longest text."""
    total: int = 0
    """Tokens of all."""


def number_of_parts(
    rows: int, micro_batch_size: int, world_size: int, sequences_per_row: int = 1
) -> int:
    """Number of microbatches in one optimizer step over `rows`, without a budget; it is the same on
    every rank."""
    return math.ceil(share(rows, 0, world_size) * sequences_per_row / micro_batch_size)
