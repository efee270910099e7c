"""Computes the reference's log-probabilities once, and stores them with the prepared data.

<storage>/prepared/<fingerprint>/reference-<key>.parquet holds a row for each row of the data. The
key is a hash of everything that the values depend on: each reference has its own file. The SHA-256
of its bytes lies beside it, so that a damaged file is computed again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ..common.errors import RunError
from ..common.storage import Folder
from ..data.batching import Batch, Rows
from ..data.microbatches import Division
from ..data.stream import every_sequence
from ..models.adapter_reference import starts_as_base
from ..models.dtypes import choose_dtype, needs_autocast, torch_dtype
from ..records.identity import Identity, identity_of
from .objective import Setup
from .preference import Split
from .references import Compute, Reference

_VERSION = 5
"""Increase it when the same reference would give other values."""

_PLACES = {"base", "revision", "adapter"}
"""Names of what the identity holds the content of."""

_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("row", pa.int64()),
        ("chosen", pa.float32()),
        ("rejected", pa.float32()),
    ]
)

_Values = list[tuple[str, int, float, float]]


class PrecomputedReference:
    """Looks up the reference's log-probabilities of a row."""

    def __init__(self, table: pa.Table) -> None:
        self._rows: dict[str, NDArray[np.int64]] = {}
        self._values: dict[str, NDArray[np.float32]] = {}
        for split in get_args(Split):
            part = table.filter(pa.compute.equal(table["split"], split)).sort_by("row")
            self._rows[split] = part["row"].to_numpy()
            self._values[split] = np.stack([part["chosen"], part["rejected"]])

    @classmethod
    def load_or_compute(
        cls,
        setup: Setup,
        named: str | None,
        division: Division,
        collate: Callable[[Rows], Batch],
        compute: Compute,
    ) -> "PrecomputedReference":
        """Read the stored values; if there are none or they are damaged, all workers compute them
        together.

        Args:
            setup: the run's setup, before the first step and before a checkpoint is loaded.
            named: `method.reference_model`; None for the model at the start of the run.
            division: how rows are divided into forward passes.
            collate: makes a batch of pairs from rows.
            compute: returns the log-probabilities of a batch, first the chosen, then the rejected.

        Raises:
            RunError: a worker reads other values than the first one has checked or written.
        """
        folder = setup.prepared.folder
        message: list[Any] = [None]
        if setup.rank == 0:
            name = f"reference-{_key(setup, named)}.parquet"
            message = [(name, _read(folder, name) is not None)]
        if setup.world_size > 1:
            dist.broadcast_object_list(message, src=0)
        name, exists = message[0]
        if not exists:
            values = _compute(setup, division, Reference(setup, named), collate, compute)
            if setup.rank == 0:
                _write(folder, name, values)
            if setup.world_size > 1:
                dist.barrier()
        table = _read(folder, name)
        if table is None:
            raise RunError(f"{folder}/{name}: damaged between writing and reading; start again")
        return cls(table)

    def of_batch(self, batch: Batch, split: Split) -> torch.Tensor:
        """Log-probabilities of a batch's chosen answers, then of its rejected ones, (2 pairs,)."""
        at = np.searchsorted(self._rows[split], batch.rows)
        return torch.from_numpy(self._values[split][:, at].reshape(-1)).to(batch.targets.device)


def _compute(
    setup: Setup,
    division: Division,
    reference: Reference,
    collate: Callable[[Rows], Batch],
    compute: Compute,
) -> _Values:
    """Compute the values of all rows of both splits; every rank returns all of them."""
    recipe = setup.recipe
    setup.model.to(setup.device)
    own: dict[tuple[str, int], tuple[float, float]] = {}
    dtype = torch_dtype(choose_dtype(recipe.model))
    with torch.autocast(setup.device.type, dtype, enabled=needs_autocast(recipe)):
        for split, rows in _shares(setup, division):
            setup.beat()
            batch = collate(rows)
            values = reference(compute, batch).view(2, -1).cpu().tolist()
            for row, chosen, rejected in zip(batch.rows.tolist(), *values, strict=True):
                own[split, row] = chosen, rejected
    parts: list[Any] = [own]
    if setup.world_size > 1:
        parts = [None] * setup.world_size
        dist.all_gather_object(parts, own)
    merged = {key: values for part in parts for key, values in part.items()}
    return [(*key, *values) for key, values in merged.items()]


def _shares(setup: Setup, division: Division) -> Iterator[tuple[str, Rows]]:
    """This worker's rows with the name of their split, in parts."""
    manifest = setup.prepared.manifest
    for name, split in (("train", manifest.train), ("eval", manifest.eval)):
        if split is not None:
            rows = every_sequence(setup.prepared.files, split, setup.rank, setup.world_size)
            for part in division.in_order(rows):
                yield name, part


def _write(folder: Folder, name: str, values: _Values) -> None:
    columns = zip(*values, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    content = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, schema=_SCHEMA), content, compression="zstd")
    data = content.getvalue().to_pybytes()
    folder.write(name, data)
    folder.write(_digest_file(name), hashlib.sha256(data).hexdigest().encode())


def _read(folder: Folder, name: str) -> pa.Table | None:
    """The stored table; None if there is none, or its bytes are not those that were written."""
    try:
        data, digest = folder.read(name), folder.read(_digest_file(name))
    except FileNotFoundError:
        return None
    if hashlib.sha256(data).hexdigest().encode() != digest:
        return None
    return pq.read_table(pa.BufferReader(data))


def _digest_file(name: str) -> str:
    return f"{name.removesuffix('.parquet')}.sha256"


def _key(setup: Setup, named: str | None) -> str:
    """16 hex digits of a hash of everything that the values depend on.

    Whole sections of the recipe count, without the settings that change no value, so that a new
    setting counts unless it is left out here.
    """
    recipe = setup.recipe
    model = recipe.model.model_dump(mode="json", exclude=_PLACES | {"gradient_checkpointing"})
    facts: dict[str, Any] = {
        "version": _VERSION,
        "prepared": setup.prepared.manifest.fingerprint,
        "dtype": choose_dtype(recipe.model),
        "autocast": needs_autocast(recipe),
        "models": _contents(identity_of(recipe)),
        "model": model,
        "trains_adapter": recipe.trains_adapter,
    }
    if named is None and not starts_as_base(recipe):
        facts["adapter"] = recipe.adapter and recipe.adapter.model_dump(mode="json")
        facts["seed"] = recipe.seed
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _contents(identity: Identity) -> list[Any]:
    """What the models hold, wherever their folders lie; a hub model is known by its name."""
    return [
        [place if "commit" in content else place.partition(" ")[0], content]
        for place, content in identity.items()
    ]
