"""The weights of a model's or adapter's folder: which files hold them, and their headers; no torch.

A safetensors file is 8 bytes with the length of its header, the header (JSON: type, shape and
place of each tensor), and the tensors without gaps.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from ..common.errors import InputError, reason
from ..common.storage import Folder

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LARGEST_HEADER = 100 * 10**6
_TYPES = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("I64", "U64", "F64", "C64"),
}
_BITS = {name: bits for bits, names in _TYPES.items() for name in names}
"""Bits of a value, by the format's name of its type."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Place of its first byte in the file."""
    stop: int
    """Place after its last byte."""


def weight_files(folder: Folder) -> list[str]:
    """The names of the files that hold a model's weights, in the order in which they are loaded.

    Raises:
        InputError: there are no safetensors, the index cannot be read, or it names a missing file.
    """
    names = folder.names()
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if INDEX_FILE not in names:
        raise InputError(_no_weights(folder, names))
    shards = sorted(set(_weight_map(folder).values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise InputError(
            f"{folder / INDEX_FILE}: names {missing[0]}, which is not there ({len(missing)} of "
            f"{len(shards)} files are missing); download the model again"
        )
    return shards


def read_weights(folder: Folder) -> dict[str, StoredTensor]:
    """The header's entry of every tensor of a model.

    Raises:
        InputError: as `weight_files` and `read_header`, or a file lacks a tensor of the index.
    """
    files = {name: read_header(folder, name) for name in weight_files(folder)}
    if SINGLE_FILE not in files:
        for tensor, name in _weight_map(folder).items():
            if tensor not in files[name]:
                raise InputError(
                    f"{folder / name}: lacks the tensor {tensor}, which {INDEX_FILE} places there; "
                    "download the model again"
                )
    return {tensor: entry for header in files.values() for tensor, entry in header.items()}


def read_header(folder: Folder, name: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose places agree with the file's length.

    Raises:
        InputError: the file is missing, empty, cut off, damaged, or not in the safetensors format.
    """
    place = folder / name
    try:
        with folder.filesystem.open_input_file(folder.file(name)) as stream:
            size = int(stream.size())
            start = bytes(stream.read(8))
            length = int.from_bytes(start, "little")
            has_header = len(start) == 8 and length <= min(size - 8, _LARGEST_HEADER)
            content = bytes(stream.read(length if has_header else 64))
    except OSError as error:
        raise InputError(
            f"{place}: cannot read the weights: {reason(error)}; restore the file, or make it "
            "readable"
        ) from None
    if not has_header:
        raise InputError(f"{place}: {_why_no_header(start + content, size)}")
    return _entries(content, 8 + length, size, place)


def _why_no_header(start: bytes, size: int) -> str:
    if size == 0:
        return "the file is empty; download or save the weights again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS instead of the weights; fetch them with git lfs pull"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            "a pickled file, which can run code and is not read; save the weights as safetensors "
            "(safe_serialization=True)"
        )
    return (
        f"not a safetensors file, or cut off inside its header ({size} bytes); download or save "
        "the weights again"
    )


def _entries(content: bytes, data: int, size: int, place: Folder) -> dict[str, StoredTensor]:
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        entries = {name: _entry(values, data) for name, values in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"{place}: damaged: its header is not that of a safetensors file; download or save the "
            "weights again"
        ) from None
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        bits = _BITS.get(entry.dtype, 0) * math.prod(entry.shape)
        is_full = entry.dtype not in _BITS or (entry.stop - entry.start) * 8 == bits
        if entry.start != end or not is_full:
            raise InputError(
                f"{place}: damaged: the place of {name} does not agree with its shape "
                f"{list(entry.shape)} ({entry.dtype}); download or save the weights again"
            )
        end = entry.stop
    if end != size:
        state = "cut off" if size < end else "damaged"
        raise InputError(
            f"{place}: {state}: its tensors end at byte {end:,}, but the file has {size:,}; "
            "download or save the weights again"
        )
    return entries


def _entry(values: Any, data: int) -> StoredTensor:
    start, stop = values["data_offsets"]
    shape = tuple(values["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (start, stop, *shape)):
        raise ValueError
    return StoredTensor(str(values["dtype"]), shape, data + start, data + stop)


def _weight_map(folder: Folder) -> dict[str, str]:
    """The file of each tensor, from the index."""
    try:
        mapping = json.loads(folder.read(INDEX_FILE))["weight_map"]
        files = set(mapping.values())
        is_usable = bool(files) and all(isinstance(f, str) and "/" not in f for f in files)
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        is_usable = False
    if not is_usable:
        raise InputError(
            f"{folder / INDEX_FILE}: not an index of weights (a JSON object weight_map with the "
            "file of each tensor); download the model again"
        )
    return dict(mapping)


def _no_weights(folder: Folder, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder / pickles[0]}: pickled weights can run code, so they are not read; save the "
            "model as safetensors (save_pretrained with safe_serialization=True)"
        )
    return f"{folder}: there are no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"
