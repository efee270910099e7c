"""Prepared rows: how full packing makes them, and how soon a run has its first batch of many."""

import json
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from measure import scratch
from near_duplicates import LENGTH

FILE_ROWS = 2000
"""Rows of a file of prepared data, 8 MB of tokens."""


def make_prepared(folder: Path, files: int) -> None:
    """Write prepared data: the same rows in each file."""
    import pyarrow as pa

    from finray.training.common.storage import Folder
    from finray.training.data.prepared import ROW_GROUP, SEQUENCE_SCHEMA, write_hashed

    draw = np.random.default_rng(0)
    offsets = pa.array(LENGTH * np.arange(FILE_ROWS + 1), pa.int32())
    one = pa.array(np.arange(FILE_ROWS + 1), pa.int32())
    tokens = FILE_ROWS * LENGTH
    table = pa.table(
        [
            pa.ListArray.from_arrays(offsets, draw.integers(0, 50_000, tokens, np.int32)),
            pa.ListArray.from_arrays(one, np.full(FILE_ROWS, LENGTH, np.int32)),
            pa.ListArray.from_arrays(offsets, pa.array(np.ones(tokens, np.bool_))),
            pa.ListArray.from_arrays(one, np.arange(FILE_ROWS)),
            pa.nulls(FILE_ROWS, pa.string()),
        ],
        schema=SEQUENCE_SCHEMA,
    )
    (folder / "train").mkdir()
    options = {"row_group_size": ROW_GROUP, "use_dictionary": False}
    hashed = write_hashed(Folder(str(folder)), "train/000000.parquet", table, **options)
    names = [f"train/{number:06d}.parquet" for number in range(files)]
    for name in names[1:]:
        shutil.copyfile(folder / names[0], folder / name)
    full, rest = divmod(FILE_ROWS, ROW_GROUP)
    groups = (*[ROW_GROUP] * full, *([rest] if rest else []))
    split = {
        "files": names,
        "hashes": [hashed] * files,
        "row_groups": [groups] * files,
        "sequences": files * FILE_ROWS,
        "documents": files * FILE_ROWS,
        "tokens": files * tokens,
        "trainable_tokens": files * tokens,
        "capacity": LENGTH,
    }
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")


def first_batch(folder: Path, share: str) -> dict[str, Any]:
    """Seconds to the first batch from a share of the first epoch on."""
    from finray.training.common.storage import Folder
    from finray.training.data.prepared import Split
    from finray.training.data.stream import Slice, stream

    values = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    names = ("files", "hashes", "row_groups")
    split = Split(**{**values, **{name: tuple(map(_tuple, values[name])) for name in names}})
    batch = 8
    step = int(split.sequences * float(share)) // batch
    started = time.perf_counter()
    part = Slice(Folder(str(folder)), split, 0, batch, 0, 1, step, split.sequences // batch)
    rows = stream(part, on_ray=False)
    taken = list(islice(rows, batch))
    seconds = time.perf_counter() - started
    rows.close()  # type: ignore[attr-defined]
    return {"seconds": seconds, "rows": len(taken)}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def over_bound(lengths: Any, capacity: int) -> float:
    """Packed rows over the lower bound: the tokens' sum, or the bound of Martello and Toth."""
    import pyarrow as pa

    from finray.training.common.storage import Folder
    from finray.training.data.assembling import AssembleTask, Part, assemble_items
    from finray.training.data.rendering import Document
    from finray.training.data.tokenising import TokenFile

    with scratch() as folder:
        attempt = Folder(str(folder))
        for name in ("tokens", "train"):
            (attempt / name).create()
        file = TokenFile(attempt, "tokens/all.parquet")
        zeros, trained = np.zeros(capacity, np.int32), np.ones(capacity, np.bool_)
        for row, length in enumerate(lengths.tolist()):
            file.add(row, Document(zeros[:length], trained[:length], (length,)), None)
        file.flush()
        file.close()
        task = AssembleTask(attempt, capacity, True, seed=0)
        parts = [Part(group, 0) for group in file.groups]
        items = assemble_items("train", parts, capacity, True)
        rows = sum(sum(task(item).row_groups) for item in items)
        pa.default_memory_pool().release_unused()
    return rows / lower_bound(lengths, capacity)


def lower_bound(lengths: Any, capacity: int) -> int:
    """The fewest rows that could hold documents of these lengths."""
    ordered = np.sort(lengths.astype(np.int64))
    sums = np.concatenate(([0], np.cumsum(ordered)))
    best = -(-int(sums[-1]) // capacity)
    half = int(np.searchsorted(ordered, capacity // 2, side="right"))
    for least in np.unique(ordered[:half]).tolist():
        alone = int(np.searchsorted(ordered, capacity - least, side="right"))
        small = sums[half] - sums[np.searchsorted(ordered, least)]
        free = (alone - half) * capacity - (sums[alone] - sums[half])
        best = max(best, len(ordered) - half + max(0, -int(-(small - free) // capacity)))
    return best


def distributions(capacity: int, tokens: int) -> dict[str, Any]:
    """Lengths of documents, by the name of their distribution."""
    draw = np.random.default_rng(0)
    count = 400_000
    lengths = {
        "log-normal around a fifth": draw.lognormal(np.log(capacity / 5), 0.8, count),
        "log-normal around a half": draw.lognormal(np.log(capacity / 2), 1.0, count),
        "log-normal around a fiftieth": draw.lognormal(np.log(capacity / 50), 0.5, count),
        "uniform": draw.integers(1, capacity + 1, count),
        "normal around a quarter": draw.normal(capacity / 4, capacity / 20, count),
    }
    chosen = {}
    for name, values in lengths.items():
        whole = np.clip(values.astype(np.int32), 1, capacity)
        chosen[name] = whole[: int(np.searchsorted(np.cumsum(whole), tokens))]
    return chosen
