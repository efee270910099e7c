"""Safetensors files, read and written one tensor at a time.

Nothing here holds more than one tensor: a model may be larger than memory.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import InputError
from ..common.progress import Progress

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
"""Largest weights file that is written, unless one tensor alone is larger."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of number types."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The weights of a folder, as transformers finds them: the index's files, or the only one.

    Raises:
        InputError: where there are none, one is missing or damaged, or of an unknown type.
    """

    def __init__(self, folder: Path) -> None:
        self.info: dict[str, TensorInfo] = {}
        self._file: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                self._read_header(path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: cannot read the weights: {error}") from None

    def _read_header(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise InputError(f"{path}: {name} is stored as {part.get_dtype()}: quantised")
                self.info[name] = TensorInfo(tuple(part.get_shape()), dtype)
                self._file[name] = path

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. The file is closed again, so that its pages can go."""
        with safe_open(self._file[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE_FILE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder}: there is no {', '.join(missing)}; expected the model's weights as "
            "safetensors"
        )
    return files


@dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    info: TensorInfo
    make: Callable[[], torch.Tensor]
    """Gives the tensor when its turn comes."""


def write_model_files(
    folder: Path,
    outputs: Sequence[Output],
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as transformers reads them: one file, or shards and their index.

    Args:
        folder: where to; it exists.
        outputs: what to write; each is made once, written and forgotten.
        progress: receives the bytes written so far and in all, after every tensor.
        shard_bytes: largest size of a file.

    Raises:
        InputError: where the disk has no room for them.
    """
    shards = _in_shards(outputs, shard_bytes)
    total = sum(output.info.bytes for output in outputs)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise InputError(f"{folder.parent}: the model takes {total:,} bytes, and {free:,} are free")
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as stream:
            for output in _write_header(stream, shard):
                _write_tensor(stream, output)
                done += output.info.bytes
                progress.advance(done, total)
        weight_map.update((output.name, name) for output in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_shards(outputs: Iterable[Output], shard_bytes: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.info.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.info.bytes
    return shards


def _write_header(stream: BinaryIO, shard: list[Output]) -> list[Output]:
    """Write a file's header; returns the tensors in the order in which they must follow.

    The format: 8 bytes with the header's length, the header as JSON padded to 8 bytes, then the
    tensors without gaps, the widest types first so that each is aligned.
    """
    ordered = sorted(shard, key=lambda output: (-output.info.dtype.itemsize, output.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in ordered:
        stop = start + output.info.bytes
        header[output.name] = {
            "dtype": _NAMES[output.info.dtype],
            "shape": output.info.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return ordered


def _write_tensor(stream: BinaryIO, output: Output) -> None:
    tensor = output.make()
    assert tensor.shape == output.info.shape and tensor.dtype == output.info.dtype, output.name
    stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
