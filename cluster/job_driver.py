"""What a submitted job runs on the cluster: `train` a staged recipe, or `pack` a run's results.

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

import yaml

from ..training.recipe import Recipe, recipe_from_dict
from ..training.run_folder import METRICS_FILE, RECIPE_FILE, REPORT_FILE, RUN_FILE, SAMPLES_FILE
from ..training.storage import Folder
from .staging import INPUTS_FOLDER

BEGIN, END = "finray-pack-begin", "finray-pack-end"
"""Lines around a packed run in a job's log."""

_RESULTS = ("adapter", "model")
_FILES = (RUN_FILE, RECIPE_FILE, REPORT_FILE, METRICS_FILE, SAMPLES_FILE)
_LINE = 1 << 16
_COMPLETE = "complete"


def main(arguments: Sequence[str]) -> int:
    """`train DIGEST [OPTION …]`, `pack STORAGE NAME`, or `doctor [STORAGE]`: the exit code."""
    from .cli import main as finray

    verb, *rest = arguments
    if verb == "pack":
        return pack(Folder(rest[0]) / rest[1])
    if verb == "doctor":
        from .doctor import main as examine

        return examine(rest[0] if rest else None)
    digest, *options = rest
    recipe = unpack(Path.cwd(), digest)
    path = Path.cwd() / f"resolved-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return finray(["train", str(path), "--address", "auto", *options])


def unpack(folder: Path, digest: str) -> Recipe:
    """Copy the files that travelled into the run's folder; the recipe then names them there."""
    values = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    recipe = recipe_from_dict(values)
    inputs = Folder(recipe.storage) / recipe.name / INPUTS_FOLDER / digest
    if (folder / INPUTS_FOLDER).is_dir() and not inputs.exists(_COMPLETE):
        inputs.upload(folder / INPUTS_FOLDER)
        inputs.write(_COMPLETE, b"")
    return recipe_from_dict(_at(values, f"./{INPUTS_FOLDER}", inputs.uri))


def pack(run: Folder) -> int:
    """Print a run's files as lines of base64; checkpoints and data stay where they are."""
    names = [name for name in run.files() if name in _FILES or name.startswith(_RESULTS)]
    if RUN_FILE not in names:
        print(f"finray: {run} holds no run yet", file=sys.stderr)
        return 2
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            content = run.read(name)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    text = base64.b64encode(buffer.getvalue()).decode()
    lines = (text[start : start + _LINE] for start in range(0, len(text), _LINE))
    print("\n".join([BEGIN, *lines, END]), flush=True)
    return 0


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
