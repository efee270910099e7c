"""The splits of a folder of data files, and the part of them that a source names.

What a folder's splits are is the datasets library's rule: the names of its files and subfolders
(train-*, test/…), or `configs` in its README.md. That library is imported only where it matters.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.errors import InputError, reason
from ..common.formatting import one_line
from ..common.storage import Folder
from .reading import count_rows
from .sources import MOST_ROWS, SourceFile, data_files

Splits = dict[str, list[SourceFile]]
"""The files of each split, by its name."""

TRAIN = "train"
_CARD, _SAVED, _SAVED_SPLITS = "README.md", "state.json", "dataset_dict.json"
_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"
_NAMES_SPLIT = re.compile(rf"(?:^|[-._ 0-9/])(?:{_WORDS})[-._ 0-9/]|-of-\d{{5}}")
_READ = {"config_name", "data_files", "data_dir", "default", "description", "features", "version"}
"""Keys of `configs` that change nothing in how files are read."""
_DEFAULT = "default"


def side_files(folder: str, files: Sequence[SourceFile]) -> list[Path]:
    """The files of a local folder that decide what its splits are, for some of its data files."""
    folders = dict.fromkeys([Path(folder), *(Path(file.uri).parent for file in files)])
    candidates = [place / name for place in folders for name in (_CARD, _SAVED, _SAVED_SPLITS)]
    return [file for file in candidates if file.is_file()]


def splits_of(folder: Folder, subset: str | None) -> Splits:
    """The splits of a folder.

    Args:
        folder: data files, or what `save_to_disk` of the datasets library wrote.
        subset: the configuration in its README.md; None: the default one.

    Raises:
        InputError: the folder has no data files or no such configuration, or a description in it
            cannot be used.
    """
    names = set(folder.names())
    if _SAVED_SPLITS in names or _SAVED in names:
        _refuse_subset(folder, subset, [])
        return _saved_splits(folder, names)
    files = data_files(folder.uri)
    configs = _configs(folder) if _CARD in names else {}
    if configs:
        return _of_config(folder, configs, subset, files)
    _refuse_subset(folder, subset, [])
    return _by_name(files)


def select(splits: Splits, requested: str | None, place: str) -> list[SourceFile]:
    """The files of a split, or of parts of splits, with the rows that are used.

    Args:
        splits: the splits that exist.
        requested: a split in the notation of the datasets library; None: train, or the only one.
        place: the folder or data set, for messages.

    Raises:
        InputError: there is no such split, it is empty, or the notation is wrong.
    """
    names = ", ".join(splits)
    if requested is None:
        if TRAIN not in splits and len(splits) > 1:
            raise InputError(f"split: {place} has no split train; name one of its splits: {names}")
        return splits[TRAIN if TRAIN in splits else next(iter(splits))]
    if requested in splits:
        return splits[requested]
    files = [
        file
        for name, start, stop in _instructions(splits, requested, place)
        for file in take_rows(splits[name], start, stop)
    ]
    if not files:
        raise InputError(f"split: {requested} of {place} is empty; its splits: {names}; take more")
    return files


def take_rows(files: Sequence[SourceFile], start: int, stop: int) -> list[SourceFile]:
    """The files with rows [start, stop) of all their rows; reads no more than it must to count."""
    taken = []
    before = 0
    for file in files:
        if before >= stop:
            break
        first = file.rows[0] if file.rows else 0
        available = count_rows(file, (file.rows[1] if file.rows else first + stop - before)) - first
        begin, end = max(0, start - before), min(available, stop - before)
        if begin < end:
            taken.append(replace(file, rows=(first + begin, first + end)))
        before += available
    return taken


class _Lengths(Mapping[str, int]):
    """Number of rows of each split, counted when it is asked for."""

    def __init__(self, splits: Splits, is_needed: bool) -> None:
        self._splits = splits
        self._is_needed = is_needed

    def __getitem__(self, name: str) -> int:
        if name not in self._splits:
            raise KeyError(name)
        if not self._is_needed:
            return MOST_ROWS
        return sum(count_rows(file, MOST_ROWS) for file in self._splits[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def _instructions(splits: Splits, requested: str, place: str) -> list[tuple[str, int, int]]:
    """(split, first row, last row) of each part."""
    from datasets import ReadInstruction

    names = ", ".join(splits)
    # A slice by numbers from the beginning is the same however many rows there are.
    is_relative = "%" in requested or "-" in requested.partition("[")[2]
    try:
        parts = ReadInstruction.from_spec(requested).to_absolute(_Lengths(splits, is_relative))
    except (ValueError, AssertionError) as error:
        if (unknown := re.match(r'Unknown split "(.*?)"', str(error))) is not None:
            raise InputError(
                f"split: {place} has no split {unknown[1]}; its splits: {names}"
            ) from None
        raise InputError(
            f"split: {requested!r} is not a split: {one_line(str(error))}; write it as in train, "
            f"train[:5%] or train[100:200]; the splits of {place}: {names}"
        ) from None
    return [(part.splitname, part.from_, part.to) for part in parts]


def _by_name(files: list[SourceFile]) -> Splits:
    """The splits that names of files and folders tell; all is train where they tell none."""
    if not any(_NAMES_SPLIT.search(file.name) for file in files):
        return {TRAIN: files}
    from datasets.data_files import _get_data_files_patterns

    patterns = _get_data_files_patterns(lambda pattern: _matching(files, pattern))
    return _matched(files, patterns)


def _matched(files: list[SourceFile], patterns: dict[str, list[str]]) -> Splits:
    matched = {
        str(split): [file for pattern in of_split for file in _matching(files, pattern)]
        for split, of_split in patterns.items()
    }
    # Two patterns of a split can match the same file.
    return {split: list(dict.fromkeys(files)) for split, files in matched.items() if files}


def _matching(files: list[SourceFile], pattern: str) -> list[SourceFile]:
    from fsspec.utils import glob_translate

    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise InputError(f"{pattern!r} is not a pattern of files: {error}; correct it") from None
    return [file for file in files if matches(file.name)]


_Configs = dict[str, dict[str, object]]


def _configs(folder: Folder) -> _Configs:
    """`configs` of the folder's README.md; empty without one."""
    text = folder.read(_CARD).decode("utf-8", "replace")
    if not re.search(r"^configs:", text, re.MULTILINE):
        return {}
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        return dict(MetadataConfigs.from_dataset_card_data(DatasetCard(text).data))
    except Exception as error:  # noqa: BLE001 - YAML and the library raise many kinds
        raise InputError(
            f"{folder}/{_CARD}: configs cannot be used: {one_line(reason(error))[:300]}; correct "
            "it, or name the files by their path"
        ) from None


def _of_config(
    folder: Folder, configs: _Configs, subset: str | None, files: list[SourceFile]
) -> Splits:
    from datasets.data_files import sanitize_patterns

    name = subset or _default_of(folder, configs)
    if name not in configs:
        _refuse_subset(folder, subset, list(configs))
    config = configs[name]
    _refuse_reading_options(folder, name, config)
    directory = str(config.get("data_dir") or "").strip("/")
    below = [file for file in files if not directory or file.name.startswith(f"{directory}/")]
    patterns = config.get("data_files")
    if patterns is None:
        splits = _by_name(below)
    else:
        prefix = f"{directory}/" if directory else ""
        written = {
            split: [prefix + pattern.removeprefix("./") for pattern in of_split]
            for split, of_split in sanitize_patterns(patterns).items()
        }
        splits = _matched(files, written)
    if not any(splits.values()):
        raise InputError(
            f"{folder}/{_CARD}: the files of subset {name} do not exist or are of no known kind; "
            "name files by their path"
        )
    return splits


def _default_of(folder: Folder, configs: _Configs) -> str:
    defaults = [name for name, config in configs.items() if config.get("default")]
    if _DEFAULT in configs:
        defaults.append(_DEFAULT)
    candidates = defaults or list(configs)
    if len(candidates) > 1 and len(configs) > 1 and not defaults:
        raise InputError(f"subset: {folder} has several: {', '.join(configs)}; name one of them")
    return candidates[0]


def _refuse_subset(folder: Folder, subset: str | None, existing: list[str]) -> None:
    if subset is not None and subset != _DEFAULT:
        names = f"its subsets: {', '.join(existing)}" if existing else "it has none; remove subset"
        raise InputError(f"subset: {folder} has no subset {subset}; {names}")


def _refuse_reading_options(folder: Folder, name: str, config: dict[str, object]) -> None:
    options = sorted(set(config) - _READ)
    if options:
        raise InputError(
            f"{folder}/{_CARD}: subset {name} sets {', '.join(options)}, which finray does not "
            "apply; convert its files to Parquet or JSON Lines, or name them by their path"
        )


def _saved_splits(folder: Folder, names: set[str]) -> Splits:
    """The splits that `save_to_disk` wrote."""
    if _SAVED_SPLITS in names:
        listed = _json(folder, _SAVED_SPLITS).get("splits")
        splits = map(str, listed if isinstance(listed, list) else ())
        # A job carries the splits that it reads.
        return {name: _saved_files(folder / name) for name in splits if folder.exists(name)}
    return {str(_json(folder, _SAVED).get("_split") or TRAIN): _saved_files(folder)}


def _saved_files(folder: Folder) -> list[SourceFile]:
    try:
        listed = [str(item["filename"]) for item in _json(folder, _SAVED)["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(
            f"{folder}/{_SAVED}: not as save_to_disk writes it; save the data set again"
        ) from None
    existing = {file.name: file for file in data_files(folder.uri)}
    missing = [name for name in listed if name not in existing]
    if missing:
        raise InputError(f"{folder}: {missing[0]} is missing; save the data set again")
    return [existing[name] for name in listed]


def _json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}/{name}: cannot read it: {reason(error)}; save the data set again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{folder}/{name}: expected an object; save the data set again")
    return content
