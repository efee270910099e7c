"""The stages that compare all rows with one another: deduplicate, and the groups of a holdout."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...common.storage import Folder
from ...config.curation import DeduplicateStage, NearDuplicates
from ..tasks import RunTasks
from .files import StageRows, held_file, index_file, left_in
from .funnel import Counts
from .links import (
    Entries,
    Mask,
    MatchItem,
    MatchTask,
    Numbers,
    Pairs,
    ScatterItem,
    ScatterTask,
    SketchItem,
    SketchTask,
    VerifyItem,
    VerifyTask,
    components,
    settle,
    unique_pairs,
    unite,
)
from .plan import GroupSettings
from .samples import sample_of
from .sketches import Bands
from .stage import Item, Reading
from .words import Hashes, mixed

_PARTITION_BYTES = 64 * 2**20
"""Entries that a task matches together."""
_ENTRY_BYTES = 24
_BLOCK_PAIRS = 20_000
"""Pairs that a task verifies."""
_SAMPLED_CHUNKS = 3
"""Chunks of which dropped rows are shown."""
_SAMPLES = 3
_EQUAL, _NEAR = "equal to an earlier row", "nearly equal to an earlier row"
_DRAW = np.uint64(0x68_6F_6C_64_6F_75_74)


@dataclass(frozen=True)
class StageChunk:
    """A chunk before a stage that compares all rows."""

    rows: StageRows
    reading: Reading
    left: int
    """Number of the chunk's rows that are left."""
    characters: int


@dataclass(frozen=True)
class Links:
    """Which rows are equal or nearly equal, by their numbers among all rows that are left."""

    near: Pairs
    """Rows whose similarity is at or above the threshold; enough pairs to link all such rows."""
    roots: Numbers
    """Of each row, the first one of all that it is linked with."""
    repeats: Mask
    """Whether a row is equal to an earlier one, or of its group."""
    facts: Hashes
    """A number for the content of each row, or its characters."""


def drop_duplicates(
    settings: DeduplicateStage,
    chunks: Sequence[StageChunk],
    folder: Folder,
    work: Folder,
    run_tasks: RunTasks,
) -> list[Counts]:
    """Of rows that are linked with one another, keep the first; writes the stage's files."""
    links = find_links(settings.near, chunks, work, run_tasks, noted="sizes")
    items = []
    sampled = 0
    for chunk, first in with_first(chunks):
        inside = slice(first, first + chunk.left)
        places = np.flatnonzero(links.roots[inside] != np.arange(first, first + chunk.left))
        shows = len(places) > 0 and sampled < _SAMPLED_CHUNKS
        sampled += shows
        size = int(links.facts[inside][places].sum())
        items.append(DropItem(chunk, places, links.repeats[inside][places], size, shows))
    return list(run_tasks(DropTask(folder), items))


@dataclass(frozen=True)
class DropItem:
    """The rows of a chunk that are dropped."""

    chunk: StageChunk
    places: Numbers
    """Their places among the rows that are left, ascending."""
    equal: Mask
    """Of each, whether it is equal to an earlier row, and not only nearly."""
    characters: int
    """Size of their texts."""
    shows: bool
    """Whether the first of them are shown."""


@dataclass(frozen=True)
class DropTask:
    """Writes which rows of a chunk are left."""

    folder: Folder

    def __call__(self, item: DropItem) -> Counts:
        chunk = item.chunk
        left = left_in(chunk.rows.folder / chunk.rows.left, chunk.rows.chunk)
        stays = np.ones(len(left), np.bool_)
        stays[item.places] = False
        counts = Counts(rows_in=len(left), rows_out=int(stays.sum()))
        reasons = Counter({_EQUAL: int(item.equal.sum()), _NEAR: int((~item.equal).sum())})
        counts.dropped.update({reason: rows for reason, rows in reasons.items() if rows})
        counts.characters_in = chunk.characters
        counts.characters_out = chunk.characters - item.characters
        if item.shows:
            shown = dict(zip(item.places[:_SAMPLES].tolist(), item.equal.tolist(), strict=False))
            for place, each in enumerate(items_of(chunk)):
                if place in shown:
                    reason = _EQUAL if shown[place] else _NEAR
                    counts.samples.append(sample_of(each.line, reason, each.row))
                if place >= max(shown):
                    break
        with index_file(self.folder, chunk.rows.chunk).completing(counts.to_json) as file:
            file.write([left[stays]])
        return counts


def hold_out(
    settings: GroupSettings,
    chunks: Sequence[StageChunk],
    folder: Folder,
    work: Folder,
    run_tasks: RunTasks,
) -> list[Counts]:
    """Hold out a share of the rows, rows that are linked with one another together."""
    by_group = settings.group_by is not None
    links = find_links(settings.near, chunks, work, run_tasks, noted="contents", by_group=by_group)
    draws = mixed(links.facts[links.roots] ^ _DRAW) >> np.uint64(11)
    held = draws.astype(np.float64) / 2**53 < settings.share
    items = [
        HoldItem(chunk, held[first : first + chunk.left]) for chunk, first in with_first(chunks)
    ]
    return list(run_tasks(HoldTask(folder), items))


@dataclass(frozen=True)
class HoldItem:
    """The rows of a chunk, and whether each is held out."""

    chunk: StageChunk
    held: Mask


@dataclass(frozen=True)
class HoldTask:
    """Writes which rows of a chunk are held out."""

    folder: Folder

    def __call__(self, item: HoldItem) -> Counts:
        chunk = item.chunk
        counts = Counts(
            rows_in=chunk.left,
            rows_out=chunk.left,
            characters_in=chunk.characters,
            characters_out=chunk.characters,
        )
        left = left_in(chunk.rows.folder / chunk.rows.left, chunk.rows.chunk)
        with held_file(self.folder, chunk.rows.chunk).completing(counts.to_json) as file:
            file.write([left, item.held])
        return counts


def find_links(
    near: NearDuplicates | None,
    chunks: Sequence[StageChunk],
    work: Folder,
    run_tasks: RunTasks,
    *,
    noted: Literal["contents", "sizes"],
    by_group: bool = False,
) -> Links:
    """Find equal and nearly equal rows among all chunks.

    Args:
        near: which rows count as nearly equal; None: equal ones only.
        chunks: the rows.
        work: an empty folder.
        run_tasks: runs the tasks.
        noted: what is said of each row.
        by_group: link rows of one group, too.
    """
    rows = sum(chunk.left for chunk in chunks)
    bands = Bands.of(near).count if near is not None else 0
    partitions = max(1, -(-rows * max(bands, 1 + by_group) * _ENTRY_BYTES // _PARTITION_BYTES))
    sketch = SketchTask(work, near, by_group, noted, partitions)
    sketches = [SketchItem(chunk.rows, chunk.reading, first) for chunk, first in with_first(chunks)]
    of_same: list[Entries] = []
    of_bands: list[Entries] = []
    roots, repeats = np.empty(rows, np.int64), np.empty(rows, np.bool_)
    facts = np.empty(rows, np.uint64)
    for item, done in zip(sketches, run_tasks(sketch, sketches), strict=True):
        inside = slice(item.first, item.first + len(done.roots))
        roots[inside], repeats[inside], facts[inside] = done.roots, done.repeats, done.facts
        of_same += done.same
        of_bands += done.bands
    matches = [
        *(MatchItem(_parts(of_same, n), True) for n in range(partitions)),
        *(MatchItem(_parts(of_bands, n), False) for n in range(partitions) if near is not None),
    ]
    proposed: list[Pairs] = []
    for match, pairs in zip(matches, run_tasks(MatchTask(work), matches), strict=True):
        if match.are_same:
            unite(roots, pairs)
            repeats[pairs[:, 1]] = True
        else:
            proposed.append(pairs)
    linked = np.zeros((0, 2), np.int64)
    if near is not None and len(candidates := unique_pairs(proposed)):
        linked = _verified(candidates, near, chunks, work, run_tasks)
        unite(roots, linked)
    settle(roots)
    return Links(linked, roots, repeats, facts)


def _verified(
    candidates: Pairs,
    near: NearDuplicates,
    chunks: Sequence[StageChunk],
    work: Folder,
    run_tasks: RunTasks,
) -> Pairs:
    """The pairs whose true similarity is at or above the threshold."""
    # Pairs of rows that are linked with one another go into the same block, where they fit.
    numbers, roots = components(candidates)
    root = roots[np.searchsorted(numbers, candidates[:, 0])]
    pairs = candidates[np.lexsort((candidates[:, 1], candidates[:, 0], root))]
    blocks = np.arange(len(pairs)) // _BLOCK_PAIRS
    needed = np.unique(
        np.concatenate([np.stack([pairs[:, side], blocks], axis=1) for side in (0, 1)]), axis=0
    )
    items = []
    for chunk, first in with_first(chunks):
        inside = slice(*np.searchsorted(needed[:, 0], [first, first + chunk.left]))
        places, of = needed[inside, 0] - first, needed[inside, 1]
        if len(places):
            order = np.lexsort((places, of))
            item = ScatterItem(chunk.rows, chunk.reading, places[order], of[order], first)
            items.append(item)
    scattered = list(run_tasks(ScatterTask(work, near.ngram), items))
    verify = [
        VerifyItem(
            pairs[blocks == block],
            tuple((each.name, each.groups[block]) for each in scattered if block in each.groups),
        )
        for block in range(int(blocks[-1]) + 1)
    ]
    parts = run_tasks(VerifyTask(work, near.jaccard), verify)
    return np.concatenate([np.zeros((0, 2), np.int64), *parts])


def _parts(entries: Sequence[Entries], partition: int) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (each.name, each.bounds[partition], each.bounds[partition + 1])
        for each in entries
        if each.bounds[partition] < each.bounds[partition + 1]
    )


def with_first(chunks: Sequence[StageChunk]) -> Iterator[tuple[StageChunk, int]]:
    """Each chunk with the number of its first row."""
    first = 0
    for chunk in chunks:
        yield chunk, first
        first += chunk.left


def items_of(chunk: StageChunk) -> Iterator[Item]:
    """The rows of a chunk."""
    for stored in chunk.rows:
        yield Item.read(stored.index, stored.line, stored.row, chunk.reading, stored.group)
