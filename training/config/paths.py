"""Makes paths in a recipe independent of the current folder."""

from pathlib import Path

from ..common.errors import InputError
from ..common.formatting import shown


def resolve_path(path: str, folder: Path) -> str:
    """An absolute path; URIs stay as they are.

    Raises:
        InputError: the path begins with the home of a user who does not exist.
    """
    if "://" in path:
        return path
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{shown(path)}: there is no such user; write the path out") from None
    return str(expanded if expanded.is_absolute() else (folder / expanded).absolute())


def resolve_model(name: str, folder: Path) -> str:
    """The absolute path of a model's folder; a hub id stays as it is."""
    is_path = name.startswith((".", "/", "~")) or is_folder(folder / name)
    return resolve_path(name, folder) if is_path else name


def is_file(path: str | Path) -> bool:
    """True if there is a file; False also for a text that cannot be a path."""
    try:
        return Path(path).is_file()
    except OSError:  # too long a name
        return False


def exists(path: str | Path) -> bool:
    """True if there is a file or a folder."""
    return is_file(path) or is_folder(path)


def is_folder(path: str | Path) -> bool:
    """True if there is a folder; False also for a text that cannot be a path."""
    try:
        return Path(path).is_dir()
    except OSError:  # too long a name
        return False
