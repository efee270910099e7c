"""What a submitted job runs on the cluster: a staged recipe or sweep, or `pack` for its results.

The working folder is the one that `staging.stage` filled.
"""

import base64
import io
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...training.common.storage import Folder
from ...training.common.yaml_text import dump_yaml, load_yaml
from ...training.records.run_folder import METRICS_FILE, REPORT_FILE, RUN_FILE, SAMPLES_FILE
from ...training.records.run_folder import RECIPE_FILE as RUN_RECIPE_FILE
from ...tuning.sweep_folder import SWEEP_FILE as SWEEP_RECORD
from ...tuning.sweep_folder import is_result
from ..jobs.staging import INPUTS_FOLDER, RECIPE_FILE, SWEEP_FILE, digest

BEGIN, END = "finray-pack-begin", "finray-pack-end"
"""Lines around a packed run in a job's log."""

_RESULTS = ("adapter", "model")
_STAGED = {"train": RECIPE_FILE, "tune": SWEEP_FILE}
_FILES = (RUN_FILE, RUN_RECIPE_FILE, REPORT_FILE, METRICS_FILE, SAMPLES_FILE)
_LINE = 1 << 16
_COMPLETE = "complete"


def main(arguments: Sequence[str]) -> int:
    """`train [OPTION …]`, `tune [OPTION …]`, `pack STORAGE NAME`, or `doctor [STORAGE]`: the exit
    code."""
    from .main import main as finray

    verb, *rest = arguments
    if verb == "pack":
        return pack(Folder(rest[0]) / rest[1])
    if verb == "doctor":
        from ..nodes.doctor import main as examine

        return examine(rest[0] if rest else None)
    path = Path.cwd() / f"resolved-{os.getpid()}.yaml"
    path.write_text(dump_yaml(unpack(Path.cwd(), _STAGED[verb])), encoding="utf-8")
    return finray([verb, str(path), "--address", "auto", *rest])


def unpack(folder: Path, file: str) -> dict[str, Any]:
    """Copy the files that travelled into the folder of run or sweep; the settings then name them
    there, by their content: a changed setting leaves the data where it is."""
    values: dict[str, Any] = load_yaml((folder / file).read_text(encoding="utf-8"))
    sent = folder / INPUTS_FOLDER
    if not sent.is_dir():
        return values
    inputs = Folder(values["storage"]) / values["name"] / INPUTS_FOLDER / digest(sent)
    if not inputs.exists(_COMPLETE):
        inputs.upload(sent)
        inputs.write(_COMPLETE, b"")
    settled: dict[str, Any] = _at(values, f"./{INPUTS_FOLDER}", inputs.uri)
    return settled


def pack(folder: Folder) -> int:
    """Print the files of a run or sweep as lines of base64; checkpoints and data stay where they
    are."""
    is_sweep = folder.exists(SWEEP_RECORD)
    names = [name for name in folder.files() if (is_result if is_sweep else _is_result)(name)]
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
    print("\n".join([BEGIN, *lines, END]), flush=True)
    return 0


def _is_result(name: str) -> bool:
    return name in _FILES or name.startswith(_RESULTS)


def _at(values: Any, prefix: str, place: str) -> Any:
    """The values, with `prefix` of each text replaced by `place`."""
    if isinstance(values, dict):
        return {key: _at(value, prefix, place) for key, value in values.items()}
    if isinstance(values, list):
        return [_at(value, prefix, place) for value in values]
    if isinstance(values, str) and values.startswith(f"{prefix}/"):
        return place + values.removeprefix(prefix)
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
