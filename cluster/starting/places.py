"""Where the rows of another project's configuration are: a data set of the hub, or files."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet|arrow|csv|tsv|txt)(\.gz|\.zst)?\Z", re.IGNORECASE)
_LOADERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
"""Names of the datasets library's loaders, in the place of a data set's."""


@dataclass(frozen=True)
class Places:
    """The folders that paths start from."""

    folders: tuple[Path, ...]
    """Where a relative path of the other project may start: the current folder, its file's."""
    target: Path
    """The folder of the recipe."""

    def path(self, text: str) -> str:
        """A path as the recipe writes it: relative to its folder, if the file exists."""
        if "://" in text or Path(text).expanduser().is_absolute():
            return text
        for folder in self.folders:
            if any(folder.glob(text)) if "*" in text else (folder / text).exists():
                return os.path.relpath(folder / text, self.target)
        return text

    def exists(self, text: str) -> bool:
        """True if a relative or absolute path leads to a file or folder."""
        return any((folder / Path(text).expanduser()).exists() for folder in self.folders)

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
