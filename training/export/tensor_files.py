"""Reads and writes safetensors files one tensor at a time, as a model may be larger than memory."""

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
from ..common.formatting import one_line
from ..common.progress import Progress

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
"""Maximum size of a weights file in bytes, unless a single tensor is larger."""

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
"""torch dtypes by their names in the safetensors format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor, from a file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The weights in a folder, which holds an index and its files, or a single file.

    Raises:
        InputError: a file is missing or damaged, or a tensor has an unsupported type.
    """

    def __init__(self, folder: Path) -> None:
        self.info: dict[str, TensorInfo] = {}
        self._file: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                self._read_header(path)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: cannot read the weights: {one_line(str(error))}; restore the file"
                ) from None

    def _read_header(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise InputError(
                        f"{path}: {name} is stored as {part.get_dtype()}, which is not supported; "
                        "give weights that are not quantised"
                    )
                self.info[name] = TensorInfo(tuple(part.get_shape()), dtype)
                self._file[name] = path

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored type. The file is closed, so that its memory can be freed."""
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
    """A tensor to write, computed at the time of writing."""

    name: str
    info: TensorInfo
    make: Callable[[], torch.Tensor]
    """Returns the tensor."""


def write_model_files(
    folder: Path,
    outputs: Sequence[Output],
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in the layout of transformers: one file, or shards and their index.

    Args:
        folder: an existing folder.
        outputs: the tensors; each is computed once and released after writing.
        progress: receives the bytes written so far and in all, after every tensor.
        shard_bytes: maximum size of a file in bytes.

    Raises:
        InputError: the disk has not enough free space.
    """
    shards = _in_shards(outputs, shard_bytes)
    total = sum(output.info.bytes for output in outputs)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise InputError(
            f"{folder.parent}: the model needs {total:,} bytes, but only {free:,} are free; make "
            "room, or give another folder"
        )
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
    """Write a file's header; returns the tensors in the order that the header declares.

    The format is: 8 bytes with the header's length, the header as JSON padded to 8 bytes, then the
    tensors without gaps. The widest types come first, so that each tensor is aligned.
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
