"""Makes paths in a recipe independent of the current folder."""

from pathlib import Path


def resolve_path(path: str, folder: Path) -> str:
    """An absolute path; URIs stay as they are."""
    if "://" in path:
        return path
    expanded = Path(path).expanduser()
    return str(expanded if expanded.is_absolute() else (folder / expanded).absolute())


def resolve_model(name: str, folder: Path) -> str:
    """The absolute path of a model's folder; a hub id stays as it is."""
    is_path = name.startswith((".", "/", "~")) or (folder / name).is_dir()
    return resolve_path(name, folder) if is_path else name
