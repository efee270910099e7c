"""Results as text in a job's log: packed on the cluster, unpacked where they are fetched.

The log reaches every machine that may use the Jobs API, which the run's storage need not.
"""

import base64
import binascii
import io
import sys
import tarfile
import tempfile
from pathlib import Path

from ...training.common.errors import InputError, RunError
from ...training.common.storage import Folder
from ...training.records.run_folder import (
    METRICS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RUN_FILE,
    SAMPLES_FILE,
)
from ...tuning.sweep_folder import SWEEP_FILE
from ...tuning.sweep_folder import is_result as is_sweep_result

_BEGIN, _END = "finray-pack-begin", "finray-pack-end"
"""Lines around the archive."""
_FILES = (RUN_FILE, RECIPE_FILE, REPORT_FILE, METRICS_FILE, SAMPLES_FILE)
_RESULTS = ("adapter", "model")
_LINE = 1 << 16
"""Characters; longer lines than a log reader may take are cut here."""


def pack(folder: Folder) -> int:
    """Print the results of a run or sweep as lines of base64, without checkpoints and data.

    Returns:
        An exit code: 2 where the folder holds no run.
    """
    is_sweep = folder.exists(SWEEP_FILE)
    is_result = is_sweep_result if is_sweep else _is_run_result
    names = [name for name in folder.files() if is_result(name)]
    if not is_sweep and RUN_FILE not in names:
        print(f"finray: {folder} holds no run yet", file=sys.stderr)
        return 2
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            content = folder.read(name)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    text = base64.b64encode(buffer.getvalue()).decode()
    lines = (text[start : start + _LINE] for start in range(0, len(text), _LINE))
    print("\n".join([_BEGIN, *lines, _END]), flush=True)
    return 0


def unpack(log: str, target: Path) -> list[str] | None:
    """Write the packed files of a job's log below `target`.

    Returns:
        Their relative paths; None where the log holds no whole archive.

    Raises:
        InputError: something that lies there is in the way; nothing is written then.
        RunError: the files cannot be written.
    """
    _, begin, rest = log.partition(f"{_BEGIN}\n")
    text, end, _ = rest.partition(f"\n{_END}")
    if not begin or not end:
        return None
    try:
        content = base64.b64decode(text.replace("\n", ""), validate=True)
    except binascii.Error:
        return None
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = archive.getnames()
        _check_free(target, names)
        _extract(archive, names, target)
    return names


def _check_free(target: Path, names: list[str]) -> None:
    """Refuse what would be written through a link, or cannot be written, before anything is."""
    for name in names:
        path = target / name
        for place in [path, *(target / parent for parent in Path(name).parents)]:
            is_inside = place != target
            should_be_folder = place != path
            if (is_inside and place.is_symlink()) or (
                place.exists() and place.is_dir() != should_be_folder
            ):
                raise InputError(
                    f"{place} is in the way, and nothing is fetched; move it, or name another "
                    "folder with --to"
                )


def _extract(archive: tarfile.TarFile, names: list[str], target: Path) -> None:
    """Extract beside the target, then move: a full disk leaves the target as it was."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            archive.extractall(folder, filter="data")
            for name in names:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write into {target}: {error}; make room, or name another folder with --to"
        ) from None


def _is_run_result(name: str) -> bool:
    return name in _FILES or name.startswith(_RESULTS)
