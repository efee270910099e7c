"""What is uploaded with a job: recipe or sweep, the local files it names, and finray itself.

The files go into a folder without any .gitignore, because Ray's packaging leaves out ignored
files. On the cluster they are copied into the run's folder, which all nodes share.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...training.common.errors import InputError
from ...training.common.secrets import texts
from ...training.common.storage import Folder
from ...training.common.yaml_text import dump_yaml, load_yaml
from ...training.config.paths import exists, is_folder
from ...training.config.places import locates
from ...training.config.recipe import Recipe
from ...training.config.source import Source
from ...training.config.user_code import functions_in
from ...training.data.expand import expand
from ...training.data.sources import SourceFile, base_of
from ...training.data.splits import side_files
from ...tuning.sweep import LoadedSweep

LIMIT_MIB = 100.0
"""Largest sum of the uploaded files, in MiB."""

RECIPE_FILE = "recipe.yaml"
SWEEP_FILE = "sweep.yaml"
INPUTS_FOLDER = "inputs"
LAUNCHER = "run.sh"
_COMPLETE = "complete"
"""Marks inputs that were copied whole."""
_PACKAGES = ("training", "tuning", "cluster", "k8s")
_FILES = ("__init__.py", "py.typed")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".gitignore", ".rayignore")

# A head's `python` may be another one; the arguments of its raylet name the workers' interpreter.
_LAUNCH = """\
process=$$
while [ -z "$python" ] && [ "${process:-1}" -gt 1 ]; do
  python=$(tr '\\0' '\\n' <"/proc/$process/cmdline" |
    sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p')
  process=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status")
done
exec "${python:-python3}" -m finray.cluster.cli.job_entry "$@"
"""


@dataclass(frozen=True)
class Staged:
    """A folder that is ready for upload."""

    digest: str
    """16 hex digits over recipe or sweep and its files, without finray's own code."""
    bytes: int
    """Size of the files that the recipe or sweep names."""
    notes: tuple[str, ...]
    """Messages to the user."""


@locates
def stage(
    recipe: Recipe, folder: Path, on_cluster: tuple[str, ...], limit_mib: float = LIMIT_MIB
) -> Staged:
    """Fill an empty folder with all that a job needs.

    Args:
        recipe: the recipe, its paths absolute.
        folder: an empty folder.
        on_cluster: folders of the cluster's nodes; paths below them are not read here.
        limit_mib: largest sum of the uploaded files, in MiB.

    Raises:
        InputError: a file is missing, the files are too big, or the storage cannot hold them.
    """
    parcel = _Parcel(folder, on_cluster)
    recipe_there = _with_cluster_paths(recipe, parcel)
    return parcel.close(RECIPE_FILE, recipe_there.model_dump(mode="json"), recipe, limit_mib)


def stage_sweep(
    loaded: LoadedSweep, folder: Path, on_cluster: tuple[str, ...], limit_mib: float = LIMIT_MIB
) -> Staged:
    """As `stage`, for a sweep, which then contains its base recipe.

    Raises:
        InputError: as `stage`, and if a searched value is a path of this machine.
    """
    with loaded.sweep.locating(), loaded.recipe.locating():
        parcel = _Parcel(folder, on_cluster)
        for key in ("search", "points"):
            parcel.refuse_paths(loaded, key)
        sweep = loaded.sweep
        base = loaded.recipe.model_copy(update={"name": sweep.name, "storage": sweep.storage})
        # Unset fields stay unset: written defaults would contradict a section that is searched.
        recipe = _with_cluster_paths(base, parcel).model_dump(mode="json", exclude_unset=True)
        recipe["method"] = {"kind": base.method.kind, **recipe.get("method", {})}
        values = sweep.model_dump(mode="json", exclude_unset=True, exclude={"set"})
        return parcel.close(SWEEP_FILE, {**values, "recipe": recipe}, base, limit_mib)


def _with_cluster_paths(recipe: Recipe, parcel: "_Parcel") -> Recipe:
    """The recipe with its paths on the cluster; adds its files to the parcel."""
    data = recipe.data.with_sources(lambda key, source: parcel.source(source, key))
    folders = {"base": parcel.folder(recipe.model.base, "model.base", "model")}
    if recipe.model.adapter is not None:
        folders["adapter"] = parcel.folder(recipe.model.adapter, "model.adapter", "adapter")
    model = recipe.model.model_copy(update=folders)
    return recipe.model_copy(update={"data": data, "model": model})


def add_finray(folder: Path) -> None:
    """Copy finray itself and the launcher script into a folder for upload."""
    (folder / LAUNCHER).write_text(_LAUNCH, encoding="utf-8")
    # importlib.metadata must know finray's version also where it is not installed.
    metadata = folder / "finray.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: finray\nVersion: {version('finray')}\n")
    root = Path(__file__).resolve().parents[2]
    for package in _PACKAGES:
        shutil.copytree(root / package, folder / "finray" / package, ignore=_LEFT_OUT)
    for file in _FILES:
        shutil.copyfile(root / file, folder / "finray" / file)


def receive(folder: Path, file: str) -> dict[str, Any]:
    """Copy staged files into the folder of the run or sweep; the counterpart of `stage`.

    Their place there depends on their content alone, so changed settings find the same data.

    Args:
        folder: what `stage` or `stage_sweep` filled.
        file: `RECIPE_FILE` or `SWEEP_FILE`.

    Returns:
        The settings in that file, with the new paths.
    """
    values: dict[str, Any] = load_yaml((folder / file).read_text(encoding="utf-8"))
    sent = folder / INPUTS_FOLDER
    if not sent.is_dir():
        return values
    inputs = Folder(values["storage"]) / values["name"] / INPUTS_FOLDER / digest(sent)
    if not inputs.exists(_COMPLETE):
        inputs.upload(sent)
        inputs.write(_COMPLETE, b"")
    settings: dict[str, Any] = _replace_prefix(values, f"./{INPUTS_FOLDER}", inputs.uri)
    return settings


def _replace_prefix(values: Any, prefix: str, place: str) -> Any:
    """The values, with the folder `prefix` of each text replaced by `place`."""
    if isinstance(values, dict):
        return {key: _replace_prefix(value, prefix, place) for key, value in values.items()}
    if isinstance(values, list):
        return [_replace_prefix(value, prefix, place) for value in values]
    if isinstance(values, str) and values.startswith(f"{prefix}/"):
        return place + values.removeprefix(prefix)
    return values


class _Parcel:
    """The uploaded files, each local path once."""

    def __init__(self, folder: Path, on_cluster: tuple[str, ...]) -> None:
        self._folder = folder
        self._inputs = folder / INPUTS_FOLDER
        self._on_cluster = tuple(Path(path) for path in on_cluster)
        self._sent: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self.notes: list[str] = []

    @property
    def bytes(self) -> int:
        """Size of the uploaded files."""
        return sum(self._sizes.values())

    def source(self, source: Source, key: str) -> Source:
        """The source with its path on the cluster; local files are added to the parcel."""
        if source.path is None or self._stays(source.path):
            return source
        return source.model_copy(update={"path": self._copy_source(source, key)})

    def folder(self, path: str, key: str, name: str) -> str:
        """Path on the cluster of a model's or adapter's folder; a hub id stays."""
        if not Path(path).is_absolute() or self._stays(path):
            return path
        if not is_folder(path):
            raise InputError(
                f"{key}: there is no folder {path} on this machine; if it is on the cluster's "
                f"nodes, add --on-cluster {path}"
            )
        files = [file for file in sorted(Path(path).iterdir()) if file.is_file()]
        self._sizes[f"{key} {path}"] = sum(file.stat().st_size for file in files)
        self._sent[path] = f"./{INPUTS_FOLDER}/{name}"
        for file in files:
            self._link(file, self._inputs / name / file.name)
        return self._sent[path]

    def refuse_paths(self, loaded: LoadedSweep, section: str) -> None:
        """Refuse local paths among searched values, because only the base recipe's files are
        uploaded."""
        values = loaded.sweep.model_dump(mode="json")[section]
        for key, text in texts({section: values}):
            if not text or "\n" in text or self._stays(text):
                continue
            code, _, function = text.rpartition(":")
            file = code if function.isidentifier() and code.endswith(".py") else text
            if exists(loaded.folder / file):
                dotted = ".".join(map(str, key))
                raise InputError(
                    f"{loaded.place(section)}: {dotted}: {file} is on this machine, and searched "
                    "files are not uploaded; put it where all nodes reach it, and name that: a "
                    "URI, a hub id, or a folder with --on-cluster FOLDER"
                )

    def close(self, file: str, values: Any, recipe: Recipe, limit_mib: float) -> Staged:
        """Check size and storage, and write recipe or sweep beside the files."""
        self.check_size(limit_mib)
        self.check_storage(recipe)
        self.check_no_path_is_left(values, recipe)
        text = dump_yaml(values)
        (self._folder / file).write_text(text, encoding="utf-8")
        staged = Staged(digest(self._folder), self.bytes, tuple(self.notes))
        add_finray(self._folder)
        return staged

    def check_no_path_is_left(self, values: Any, recipe: Recipe) -> None:
        """Refuse a folder of this machine that is not uploaded: a reference, a reward model.

        Files of the user's code are inside the recipe.
        """
        inside = tuple(f"{key}.file" for key, _ in functions_in(recipe))
        for key, text in texts(values):
            dotted = ".".join(map(str, key))
            is_path = text.startswith("/") and "\n" not in text
            if not is_path or key[-1] in ("storage", "system") or self._stays(text):
                continue
            if not dotted.endswith(inside) and exists(text):
                raise InputError(
                    f"{dotted}: {text} is on this machine, and is not uploaded with a job; put it "
                    "where all nodes reach it, and name that: a URI, a hub id, or a folder with "
                    "--on-cluster FOLDER"
                )

    def check_size(self, limit_mib: float) -> None:
        """Refuse files that are too large together; the message lists the largest first."""
        if self.bytes <= limit_mib * 2**20:
            return
        sizes = sorted(self._sizes.items(), key=lambda item: -item[1])
        key = sizes[0][0].partition(" ")[0]
        listed = "\n".join(f"  {size / 2**20:,.1f} MiB  {name}" for name, size in sizes)
        raise InputError(
            f"{key}: the recipe's local files are {self.bytes / 2**20:,.1f} MiB, and at most "
            f"{limit_mib:g} MiB are uploaded with a job:\n{listed}\n"
            "Put the large ones where all nodes reach them and name that in the recipe: a shared "
            "folder (with --on-cluster FOLDER), s3://, gs://, or for a model its hub id. "
            "--max-mib raises the limit."
        )

    def check_storage(self, recipe: Recipe) -> None:
        """Refuse a storage that cannot hold the uploaded files; note where results go."""
        is_store = "://" in recipe.storage
        for key, path in (("base", recipe.model.base), ("adapter", recipe.model.adapter)):
            if is_store and path in self._sent:
                raise InputError(
                    f"model.{key}: the folder {path} can be uploaded only if the storage is a "
                    f"folder, and it is {recipe.storage}; give a hub id, or a folder of the nodes "
                    "with --on-cluster"
                )
        if is_store and self._sent and "?" in recipe.storage:
            raise InputError(
                "storage: local files cannot be uploaded to a storage whose URI has a query; put "
                "them into the store and name them by their URI"
            )
        where = "" if is_store else ", a folder of the cluster that all its nodes must share"
        self.notes.append(f"results go to {recipe.storage}{where}")
        if self._sent:
            self.notes.append(
                f"{self.bytes / 2**20:,.1f} MiB of local files are uploaded, and kept in "
                f"{recipe.storage}/{recipe.name}/{INPUTS_FOLDER}"
            )

    def _stays(self, path: str) -> bool:
        return "://" in path or any(Path(path).is_relative_to(there) for there in self._on_cluster)

    def _copy_source(self, source: Source, key: str) -> str:
        """Add a source's files; returns its path on the cluster.

        Sources can take splits of the same folder, whose files then lie together.
        """
        path = source.place
        try:
            files = expand(source).files
        except InputError as error:
            raise InputError(
                f"{key}: {error}; if it is a path of the cluster's nodes, add --on-cluster FOLDER"
            ) from None
        base, name = base_of(path)
        if path not in self._sent:
            self._sent[path] = f"./{INPUTS_FOLDER}/{len(self._sent)}{name}"
        folder = self._folder / self._sent[path].removesuffix(name)
        described = [] if name else side_files(base, files)
        for local in dict.fromkeys([*(Path(file.uri) for file in files), *described]):
            target = folder / local.relative_to(base)
            if not target.is_symlink():
                self._link(local, target)
                self._sizes[f"{key} {path}"] = (
                    self._sizes.get(f"{key} {path}", 0) + local.stat().st_size
                )
        self._note_hidden(files)
        return self._sent[path]

    def _note_hidden(self, files: Sequence[SourceFile]) -> None:
        hidden = [file.uri for file in files if _hidden_by_git(Path(file.uri))]
        if hidden:
            more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
            self.notes.append(f"{hidden[0]}{more} is uploaded although .gitignore hides it")

    def _link(self, source: Path, target: Path) -> None:
        """Link instead of copying: packaging follows links, and the limit may still refuse."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())


def _hidden_by_git(file: Path) -> bool:
    git = shutil.which("git")
    if git is None:
        return False
    command = [git, "-C", str(file.parent), "check-ignore", "--quiet", "--", file.name]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def digest(folder: Path) -> str:
    """16 hex digits over names and content of all files below."""
    hashed = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        hashed.update(f"{file.relative_to(folder)}\n".encode())
        with file.open("rb") as stream:
            hashed.update(hashlib.file_digest(stream, "sha256").digest())
    return hashed.hexdigest()[:16]
