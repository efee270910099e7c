"""Finds rows of all sources that are equal or nearly equal, as links between their numbers.

    sketch   each chunk: a row's content and the bands of its sketch, sorted into partitions; of
             rows that are equal within it, the first stands for all
    match    each partition: rows with the same content are linked; rows in the same band are a
             candidate pair
    scatter  each chunk: the word runs of rows in candidate pairs, sorted into blocks of pairs
    verify   each block: the true Jaccard similarity of each pair

So a task holds a chunk, a partition or a block. What goes from task to task is in files; the driver
holds 17 bytes a row, and 16 for each pair.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ...common.storage import Folder
from ...config.curation import NearDuplicates
from ..shapes import LabelledExample, PreferencePair
from .files import StageRows
from .sketches import Bands, band_keys
from .stage import Item, Reading
from .texts import compared_texts
from .words import Hashes, distinct, word_runs

Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Pairs = NDArray[np.int64]
"""Of rows, shape (pairs, 2), the smaller number first."""

_BATCH = 1000
_PART_ROWS, _PART_CHARACTERS = 50_000, 4_000_000
"""Rows whose entries are written together: at most so many, or of so many characters."""
_SMALL_BUCKET = 16
"""In a bucket of up to this many rows all pairs are candidates."""
_PIVOTS, _NEIGHBOURS = 8, 4
"""In a larger one each row is a candidate with the first rows and its next ones, by content."""
_UNITED = 1_000_000
"""Pairs, or rows, that are looked at together."""
_CONTENT_LABEL = np.uint64(0xA5A5_5A5A_0F0F_F0F0)


@dataclass(frozen=True)
class SketchItem:
    """A chunk to sketch."""

    rows: StageRows
    reading: Reading
    first: int
    """Number of its first row that is left, among those of all chunks."""


@dataclass(frozen=True)
class Entries:
    """A file of (key, content, number) entries, sorted by partition."""

    name: str
    bounds: tuple[int, ...]
    """Partition p has the entries from bounds[p] to bounds[p + 1]."""


@dataclass(frozen=True)
class Sketched:
    """What a sketch task wrote."""

    same: tuple[Entries, ...]
    """Rows with equal keys and contents are linked."""
    bands: tuple[Entries, ...]
    """Rows with equal keys are candidates, unless their contents are equal, too."""
    roots: Numbers
    """Of each row, the first one that it is linked with within a part of the chunk."""
    repeats: Mask
    """Whether there is an earlier one."""
    facts: Hashes
    """A number for the content of each row, or its characters."""


@dataclass(frozen=True)
class SketchTask:
    """Writes the keys by which rows find their equals."""

    work: Folder
    near: NearDuplicates | None
    by_group: bool
    """Link rows of the same group, too."""
    noted: Literal["contents", "sizes"]
    """What is said of each row."""
    partitions: int

    def __call__(self, item: SketchItem) -> Sketched:
        same, bands, facts = [], [], [np.zeros(0, np.uint64)]
        roots, repeats = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
        first = item.first
        for part, items in enumerate(_parts(item.rows, item.reading, _PART_ROWS)):
            name = f"{item.rows.chunk:06d}-{part:04d}"
            digests = np.frombuffer(b"".join(each.digest for each in items), np.uint64)
            digests = digests.reshape(-1, 2)
            numbers = np.arange(first, first + len(items))
            entries = entries_of(digests[:, 0], digests[:, 1], numbers)
            if self.by_group:
                entries = np.concatenate([entries, _group_entries(items, numbers)])
            firsts, pairs = equal_rows(entries)
            same.append(self._write(f"same-{name}", firsts))
            linked = np.arange(len(items))
            unite(linked, pairs - first)
            settle(linked)
            roots.append(linked + first)
            repeats.append(np.isin(numbers, pairs[:, 1]))
            if self.near is not None:
                bands.append(self._write(f"bands-{name}", self._bands(items, digests, first)))
            if self.noted == "contents":
                facts.append(digests[:, 0])
            else:
                facts.append(np.array([each.size for each in items], np.uint64))
            first += len(items)
        return Sketched(
            tuple(same),
            tuple(bands),
            np.concatenate(roots),
            np.concatenate(repeats),
            np.concatenate(facts),
        )

    def _bands(self, items: Sequence[Item], digests: Hashes, first: int) -> Hashes:
        """The entries of sketches, of each content once."""
        assert self.near is not None
        contents: dict[bytes, int] = {}
        for n, each in enumerate(items):
            contents.setdefault(each.digest, n)
        places = np.array(list(contents.values()), np.int64)
        keys, kept = _band_entries([items[n] for n in contents.values()], self.near)
        places = places[kept]
        return entries_of(
            keys.reshape(-1),
            np.repeat(digests[places, 0], keys.shape[1]),
            np.repeat(places + first, keys.shape[1]),
        )

    def _write(self, name: str, entries: Hashes) -> Entries:
        # The upper half of a key, as its lower half may be a counter.
        partition = (entries[:, 0] >> np.uint64(32)) * np.uint64(self.partitions) >> np.uint64(32)
        order = np.argsort(partition, kind="stable")
        counts = np.bincount(partition.astype(np.int64), minlength=self.partitions)
        with self.work.filesystem.open_output_stream(self.work.file(name)) as stream:
            stream.write(entries[order].tobytes())
        return Entries(name, (0, *np.cumsum(counts).tolist()))


def _parts(rows: Iterable[Any], reading: Reading, size: int) -> Iterator[list[Item]]:
    part: list[Item] = []
    characters = 0
    for stored in rows:
        part.append(Item.read(stored.index, stored.line, stored.row, reading, stored.group))
        characters += part[-1].size
        if len(part) >= size or characters >= _PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def entries_of(keys: Hashes, contents: Hashes, numbers: Numbers) -> Hashes:
    """Entries of rows: shape (entries, 3)."""
    return np.stack([keys, contents, numbers.astype(np.uint64)], axis=1)


def _group_entries(items: Sequence[Item], numbers: Numbers) -> Hashes:
    digests = [
        hashlib.blake2b((item.group or "").encode(), digest_size=16, person=b"group").digest()
        for item in items
    ]
    pairs = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return entries_of(pairs[:, 0], pairs[:, 1], numbers)


def _band_entries(items: Sequence[Item], near: NearDuplicates) -> tuple[Hashes, Numbers]:
    """The bands of each row that has words, and the places of these rows."""
    bands = Bands.of(near)
    keys, places = [np.zeros((0, bands.count), np.uint64)], [np.zeros(0, np.int64)]
    for start in range(0, len(items), _BATCH):
        hashes, offsets = runs_of(items[start : start + _BATCH], near.ngram)
        filled = np.flatnonzero(np.diff(offsets))
        keys.append(band_keys(hashes, np.append(offsets[filled], offsets[-1]), bands))
        places.append(filled + start)
    return np.concatenate(keys), np.concatenate(places)


def runs_of(items: Sequence[Item], ngram: int) -> tuple[Hashes, Numbers]:
    """The word runs by which rows are compared, with repetitions, and where each row's begin.

    Rows with different labels have none in common, nor has the answer that one pair prefers with
    the one that another rejects.
    """
    texts: list[str] = []
    marked: list[bool] = []
    firsts = [0]
    for item in items:
        example = item.example
        if isinstance(example, PreferencePair):
            answers = (example.chosen, example.rejected)
            texts += ["\n".join(compared_texts(answer)) for answer in answers]
            marked += [False, True]
        else:
            texts.append("\n".join(item.texts))
            marked.append(isinstance(example, LabelledExample) and example.label)
        firsts.append(len(texts))
    runs = word_runs(texts, ngram)
    hashes = runs.hashes
    hashes[np.repeat(np.array(marked, np.bool_), np.diff(runs.offsets))] ^= _CONTENT_LABEL
    return hashes, runs.offsets[firsts]


@dataclass(frozen=True)
class MatchItem:
    """A partition: the entries of all sketch tasks that fall into it."""

    parts: tuple[tuple[str, int, int], ...]
    """(file, first entry, last entry)"""
    are_same: bool
    """Whether the entries are those of contents, or of bands."""


@dataclass(frozen=True)
class MatchTask:
    """Finds the pairs of a partition: links, or candidates."""

    work: Folder

    def __call__(self, item: MatchItem) -> Pairs:
        parts = [np.zeros((0, 3), np.uint64)]
        for name, first, last in item.parts:
            with self.work.filesystem.open_input_file(self.work.file(name)) as stream:
                content = stream.read_at(24 * (last - first), 24 * first)
            parts.append(np.frombuffer(content, np.uint64).reshape(-1, 3))
        entries = np.concatenate(parts)
        return equal_rows(entries)[1] if item.are_same else candidates_in(entries)


def equal_rows(entries: Hashes) -> tuple[Hashes, Pairs]:
    """The first entry of each key and content, and each other one's row with that one's."""
    order = np.lexsort((entries[:, 2], entries[:, 1], entries[:, 0]))
    entries = entries[order]
    is_first = np.ones(len(entries), np.bool_)
    is_first[1:] = (entries[1:, :2] != entries[:-1, :2]).any(axis=1)
    numbers = entries[:, 2].astype(np.int64)
    firsts = numbers[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
    return entries[is_first], np.stack([firsts, numbers], axis=1)[~is_first]


def candidates_in(entries: Hashes) -> Pairs:
    """Pairs of rows with the same key and different contents.

    In large buckets each row meets only some: of so many nearly equal rows one link each is enough.
    """
    order = np.lexsort((entries[:, 2], entries[:, 1], entries[:, 0]))
    entries = entries[order]
    is_new = np.ones(len(entries), np.bool_)
    is_new[1:] = (entries[1:, :2] != entries[:-1, :2]).any(axis=1)
    entries = entries[is_new]
    # Ordered by content: buckets with the same rows have the same pairs.
    keys, numbers = entries[:, 0], entries[:, 2].astype(np.int64)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    sizes = np.diff(np.append(starts, len(keys)))
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    place = np.arange(len(keys))
    pairs = [np.zeros((0, 2), np.int64)]
    is_small = size <= _SMALL_BUCKET
    for step in range(1, _SMALL_BUCKET):
        reach = place + step < start + size
        reach &= is_small if step > _NEIGHBOURS else True
        left = place[reach]
        if len(left) == 0:
            break
        pairs.append(np.stack([numbers[left], numbers[left + step]], axis=1))
    for pivot in range(_PIVOTS):
        far = place[~is_small & (place > start + pivot)]
        pairs.append(np.stack([numbers[start[far] + pivot], numbers[far]], axis=1))
    return unique_pairs(pairs)


def unique_pairs(parts: Iterable[Pairs]) -> Pairs:
    """Each pair once, in order."""
    codes = [np.zeros(0, np.uint64)]
    for pairs in parts:
        low, high = pairs.min(axis=1), pairs.max(axis=1)
        codes.append(distinct(low.astype(np.uint64) << np.uint64(32) | high.astype(np.uint64)))
    whole = distinct(np.concatenate(codes))
    lower = whole & np.uint64(0xFFFF_FFFF)
    return np.stack([whole >> np.uint64(32), lower], axis=1).astype(np.int64)


@dataclass(frozen=True)
class ScatterItem:
    """The rows of a chunk that are in candidate pairs."""

    rows: StageRows
    reading: Reading
    places: Numbers
    """Their places among the rows that are left, once for each block, sorted by block."""
    blocks: Numbers
    """Number of the block of each place."""
    first: int


@dataclass(frozen=True)
class Scattered:
    """A file of word runs with a row group for each block."""

    name: str
    groups: dict[int, int]
    """Row group by block."""


_RUNS = pa.schema([("number", pa.int64()), ("runs", pa.list_(pa.uint64()))])


@dataclass(frozen=True)
class ScatterTask:
    """Writes the word runs of rows for the blocks that need them."""

    work: Folder
    ngram: int

    def __call__(self, item: ScatterItem) -> Scattered:
        numbers = set(item.places.tolist())
        runs: dict[int, Hashes] = {}
        chosen = (row for place, row in enumerate(item.rows) if place in numbers)
        places = iter(sorted(numbers))
        for items in _parts(chosen, item.reading, _BATCH):
            hashes, offsets = runs_of(items, self.ngram)
            for n in range(len(items)):
                runs[next(places)] = distinct(hashes[offsets[n] : offsets[n + 1]])
        name = f"runs-{item.rows.chunk:06d}.parquet"
        groups: dict[int, int] = {}
        with pq.ParquetWriter(
            self.work.file(name), _RUNS, filesystem=self.work.filesystem, compression="none"
        ) as writer:
            for block in np.unique(item.blocks).tolist():
                of_block = item.places[item.blocks == block]
                groups[block] = len(groups)
                columns = [of_block + item.first, [runs[place] for place in of_block.tolist()]]
                writer.write_table(pa.table(columns, schema=_RUNS), row_group_size=len(of_block))
        return Scattered(name, groups)


@dataclass(frozen=True)
class VerifyItem:
    """A block of candidate pairs, and where the word runs of its rows are."""

    pairs: Pairs
    parts: tuple[tuple[str, int], ...]
    """(file, row group)"""


@dataclass(frozen=True)
class VerifyTask:
    """Computes the Jaccard similarity of pairs."""

    work: Folder
    jaccard: float

    def __call__(self, item: VerifyItem) -> Pairs:
        """Pairs at or above the threshold. Those of rows that others of them link are left out."""
        runs: dict[int, Hashes] = {}
        for name, group in item.parts:
            with pq.ParquetFile(self.work.file(name), filesystem=self.work.filesystem) as parquet:
                table = parquet.read_row_group(group)
            for number, values in zip(table["number"].to_pylist(), table["runs"], strict=True):
                runs[number] = values.values.to_numpy()
        roots = {number: number for number in runs}
        linked = []
        for pair in item.pairs.tolist():
            first, second = (_root(roots, number) for number in pair)
            if first != second and jaccard(runs[pair[0]], runs[pair[1]]) >= self.jaccard:
                roots[max(first, second)] = min(first, second)
                linked.append(pair)
        return np.array(linked, np.int64).reshape(-1, 2)


def _root(roots: dict[int, int], number: int) -> int:
    while roots[number] != number:
        roots[number] = roots[roots[number]]
        number = roots[number]
    return number


def jaccard(first: Hashes, second: Hashes) -> float:
    """Size of the intersection of two sets over that of their union.

    Args:
        first, second: sorted members, each once.
    """
    smaller, larger = sorted((first, second), key=len)
    places = np.searchsorted(larger, smaller)
    places[places == len(larger)] = 0
    common = int((larger[places] == smaller).sum())
    return common / (len(first) + len(second) - common)


def components(pairs: Pairs) -> tuple[Numbers, Numbers]:
    """The rows that pairs link with one another.

    Returns:
        The numbers of all rows in pairs, ascending, and for each the smallest number that it is
        linked with.
    """
    numbers = distinct(pairs.reshape(-1))
    roots = np.arange(len(numbers))
    unite(roots, np.searchsorted(numbers, pairs))
    settle(roots)
    return numbers, numbers[roots]


def unite(roots: Numbers, pairs: Pairs) -> None:
    """Link the rows of pairs with one another.

    Args:
        roots: of each row, itself or a smaller one that it is linked with; changed.
        pairs: the rows.
    """
    for start in range(0, len(pairs), _UNITED):
        part = pairs[start : start + _UNITED]
        ends = part
        while True:
            # Each pass halves the ways to the roots, however long a chain the pairs form.
            while not np.array_equal(above := roots[roots[ends]], near := roots[ends]):
                roots[ends] = above
            ends = near
            low, high = ends.min(axis=1), ends.max(axis=1)
            differ = low != high
            if not differ.any():
                break
            np.minimum.at(roots, high[differ], low[differ])
        roots[part] = ends


def settle(roots: Numbers) -> None:
    """Let each row name the smallest one that it is linked with.

    Args:
        roots: as `unite` leaves them; changed.
    """
    for start in range(0, len(roots), _UNITED):
        part = roots[start : start + _UNITED]
        while not np.array_equal(above := roots[part], part):
            part[:] = above
