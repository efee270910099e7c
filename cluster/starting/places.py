"""Where the rows of another project's configuration are: a data set of the hub, or files."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training.config.paths import exists, is_folder, resolve_path
from .draft import ForeignSettings

_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet|arrow|csv|tsv|txt)(\.gz|\.zst)?\Z", re.IGNORECASE)
_LOADERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
"""Names of the datasets library's loaders, given instead of a data set's."""


def files_of(settings: ForeignSettings, split: Any = None) -> list[str]:
    """The files that the datasets library reads for `data_files`.

    Args:
        settings: of a data set; data_files is a file, a list of them, or one of both by split.
        split: the split that is read, train if it is None; where no file is named by it, all are.

    Raises:
        InputError: data_files is something else.
    """
    value = settings.value("data_files")
    if isinstance(value, dict):
        own = value.get(re.split(r"[\[+]", str(split or "train"))[0])
        value = own or [
            file
            for files in value.values()
            for file in (files if isinstance(files, list) else [files])
        ]
    files = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(file, str) and file for file in files):
        raise settings.fault("data_files", "a file, a list of files, or these by split")
    return files


def starting_folders(folder: Path) -> tuple[Path, ...]:
    """Where relative paths of a configuration may start: its folder, the current one, and the root
    of the project that it is in, where these projects' commands are mostly started."""
    roots = (parent for parent in folder.parents if (parent / "pyproject.toml").is_file())
    return tuple(
        dict.fromkeys((folder, Path.cwd(), *([root] if (root := next(roots, None)) else [])))
    )


def _matches(folder: Path, pattern: str) -> bool:
    return any(True for _ in glob.iglob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207 - which raises for **x


@dataclass(frozen=True)
class Places:
    """The folders that paths start from."""

    folders: tuple[Path, ...]
    """Where a relative path of the other project may start: the current folder, its file's."""
    target: Path
    """The folder of the recipe."""

    def path(self, text: str) -> str:
        """A path as the recipe writes it: relative to its folder, if the file exists."""
        if "://" in text or text.startswith("~") or Path(text).is_absolute():
            return text
        for folder in self.folders:
            is_pattern = any(sign in text for sign in "*?[")
            if exists(folder / text) or (is_pattern and _matches(folder, text)):
                return os.path.relpath(folder / text, self.target)
        return text

    def model(self, name: str) -> str:
        """A model's or an adapter's folder as `path`; an id of the hub stays as it is."""
        return self.path(name) if self.is_local(name) else name

    def exists(self, text: str) -> bool:
        """True if a relative or absolute path leads to a file or folder."""
        return any(exists(resolve_path(text, folder)) for folder in self.folders)

    def has_folder(self, text: str) -> bool:
        """True if a relative or absolute path leads to a folder."""
        return any(is_folder(resolve_path(text, folder)) for folder in self.folders)

    def source(self, name: str, files: list[str]) -> list[dict[str, Any]]:
        """The sources of a data set's name, or of files in it.

        Args:
            name: a data set of the hub, a file, a folder, a URI, or a loader's name.
            files: files in it; empty for all.
        """
        if files and (name in _LOADERS or not name):
            return [{"path": self.path(file)} for file in files]
        if files and not self.is_local(name):
            return [
                {"path": file if "://" in file else f"hf://datasets/{name}/{file}"}
                for file in files
            ]
        if files:
            return [{"path": self.path(os.path.join(name, file))} for file in files]  # noqa: PTH118
        if self.is_local(name):
            return [{"path": self.path(name)}]
        return [{"dataset": name}]

    def is_local(self, name: str) -> bool:
        """True for a path or a URI, False for a data set of the hub."""
        if "://" in name or name.startswith((".", "/", "~")) or _FILE.search(name):
            return True
        return self.exists(name) or name.count("/") > 1
