"""Data preparation: read, normalise, tokenise, pack, and store the result by its fingerprint."""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyarrow import fs as pafs

from ..common.errors import RunError
from ..common.formatting import one_line
from ..common.progress import SILENT, Progress
from ..common.storage import Folder
from ..config.recipe import Recipe
from .curation.curate import Window as CuratedWindow
from .curation.curate import train_chunks
from .curation.files import STAGES
from .curation.funnel import BAD_ROW
from .curation.plan import plan_stages
from .curation.scoring import OpenScorer
from .fingerprint import fingerprint
from .preparation import Preparation, WindowPart, check_bad_rows
from .prepared import (
    MANIFEST,
    QUARANTINE,
    STAGES_FILE,
    DamagedDataError,
    Prepared,
    open_prepared,
    publish,
    remarks,
)
from .resolve import ResolvedData, identified_data, read_twice, resolve_data
from .tasks import RunTasks
from .tokenising import (
    TOKENS,
)
from .window_plan import WindowPlan, place_in_file

_STALE_SECONDS = 24 * 3600
_HASHED_BYTES = 64 * 2**20
"""Sources up to this size are hashed in a moment."""


def prepare(
    recipe: Recipe,
    folder: Folder,
    run_tasks: RunTasks,
    progress: Progress = SILENT,
    open_scorer: OpenScorer | None = None,
) -> Prepared:
    """Prepare a recipe's data, or return it if it is prepared already and not known to be damaged.

    Of data that streams, that is the first window, and the rows held out.

    Each attempt writes into its own folder, and publishes it by writing the manifest that names
    this folder. So files of a killed process are never read, and if two processes prepare the same
    data, one result is kept.

    Args:
        recipe: the recipe, its paths absolute.
        folder: <storage>/prepared.
        run_tasks: runs the tasks, in this process or on Ray.
        progress: receives a status after every finished task.
        open_scorer: opens the reward model of a stage of data.curate.

    Raises:
        InputError: sources or rows are wrong, too many rows are bad, or no sequence is left.
        RunError: the storage is full, or cannot be written to.
    """
    data = identified_data(recipe)
    key = fingerprint(recipe, data)
    home = folder / key
    with storage_errors(folder):
        home.touch()
        prepared = _opened(home, progress)
        if prepared is None:
            attempt = (home / uuid.uuid4().hex).create()
            part = Windows(recipe, data).part(0) if recipe.data.streams else None
            stages = folder if part is None else attempt
            work = Preparation(
                *(recipe, data, stages, attempt, run_tasks, progress, part, open_scorer)
            )
            prepared = _run_and_publish(work, key, home, attempt)
    manifest = prepared.manifest
    for remark in (*read_twice(recipe, data), *remarks(manifest.summary())):
        progress.status(f"data: {remark}")
    with suppress(OSError):  # the data can be used without
        _remove_stale(home, manifest.attempt)
    check_bad_rows(recipe, manifest.dropped.get(BAD_ROW, 0), manifest.rows_read, home)
    return prepared


def _opened(home: Folder, progress: Progress) -> Prepared | None:
    """The finished data set in a folder; None if there is none, or it has to be prepared again."""
    try:
        return open_prepared(home)
    except DamagedDataError as error:
        progress.status(f"{error}; preparing the data again")
        return None


@contextmanager
def storage_errors(folder: Folder) -> Iterator[None]:
    """Turn errors of the storage into one message; those of source files are InputErrors."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder}: cannot write the prepared data: {one_line(str(error))}; make room or allow "
            "writing there, or set storage to another folder"
        ) from None


def find_prepared(recipe: Recipe, folder: Folder) -> Prepared | None:
    """The prepared data of a recipe in the folder <storage>/prepared, or None if there is none or
    it is damaged.

    Raises:
        InputError: sources are wrong.
    """
    data = resolve_data(recipe)
    try:
        if not _may_be_prepared(data, folder):
            return None
        return open_prepared(folder / fingerprint(recipe, data))
    except DamagedDataError:
        return None


def _may_be_prepared(data: ResolvedData, folder: Folder) -> bool:
    """False if no prepared data set comes from sources of these sizes: the content of large files
    takes long to hash."""
    sizes = [[source.bytes for source in sources] for sources in (data.train, data.eval)]
    if sum(map(sum, sizes)) < _HASHED_BYTES:
        return True
    for name in folder.names():
        try:
            prepared = open_prepared(folder / name)
        except DamagedDataError:
            continue
        if prepared is not None and sizes == [
            [source.bytes for source in prepared.manifest.sources if source.split == split]
            for split in ("train", "eval")
        ]:
            return True
    return False


def _run_and_publish(work: "Preparation", key: str, home: Folder, attempt: Folder) -> Prepared:
    """Run an attempt and publish it; if another attempt was faster, return that one."""
    try:
        manifest = work.run(key)
        for name in (TOKENS, STAGES):
            attempt.delete(name)
        if attempt.exists(QUARANTINE):
            home.write(QUARANTINE, attempt.read(QUARANTINE))
        if work.stages:
            home.write(STAGES_FILE, json.dumps(work.stages).encode())
    except BaseException:
        with suppress(OSError):  # the first error says more
            _clear(attempt, keep=QUARANTINE)
        raise
    # Outside the clause above, because a published attempt must not be cleared.
    prepared = publish(home, manifest)
    if prepared.manifest.attempt != manifest.attempt:
        attempt.delete()
    return prepared


class Windows:
    """Makes the windows of a recipe's training data, one at a time.

    Args:
        recipe: the recipe, whose data streams.
        data: its sources.

    Raises:
        InputError: see `WindowPlan`.
    """

    def __init__(self, recipe: Recipe, data: ResolvedData) -> None:
        self._recipe = recipe
        self._data = data
        self._stages = plan_stages(recipe, data) if recipe.data.is_curated else ()
        self._references: dict[str, bytes] = {}
        self.plan = WindowPlan(recipe, data)

    def part(self, number: int, before: tuple[int, int] = (0, 0)) -> WindowPart:
        """A window, by its number; `before` are the bad rows, and all rows, before it."""
        blocks = tuple(self.plan.blocks(number))
        curation = None
        if self._stages:
            pieces = [(block.source, block.chunk) for block in blocks]
            chunks = train_chunks(self._recipe, self._data, pieces)
            may_be_empty = self.plan.windows > 1
            curation = CuratedWindow(
                self._stages, chunks, place_in_file, self._references, may_be_empty
            )
        return WindowPart(number, self.plan.windows, blocks, curation, before)

    def prepare(
        self, part: WindowPart, home: Folder, run_tasks: RunTasks, progress: Progress
    ) -> Prepared:
        """Prepare a window. The list of its bad rows lies beside its folder, and stays.

        Args:
            part: the window.
            home: a folder for it; what it holds already is replaced.
            run_tasks: runs the tasks.
            progress: receives a status after every finished task.

        Raises:
            InputError: a source is wrong, or too many rows are bad.
            RunError: the storage is full, or cannot be written to.
        """
        bad_rows = home.parent, f"{home.name}-{QUARANTINE}"
        with storage_errors(home):
            home.delete()
            try:
                attempt = (home / uuid.uuid4().hex).create()
                work = Preparation(
                    *(self._recipe, self._data, attempt, attempt, run_tasks, progress, part),
                    quarantine=bad_rows,
                )
                manifest = work.run(str(part.number))
                for name in (TOKENS, STAGES):
                    attempt.delete(name)
                home.write(MANIFEST, manifest.to_json())
            except BaseException:
                with suppress(OSError):  # the first error says more
                    home.delete()
                raise
        return Prepared(home, manifest)


def _clear(attempt: Folder, keep: str) -> None:
    """Delete a failed attempt's files except `keep`, its list of bad rows, for the user."""
    for name in attempt.names():
        if name != keep:
            attempt.delete(name)
    if not attempt.exists(keep):
        attempt.delete()


def _remove_stale(home: Folder, current: str) -> None:
    """Delete attempts of killed processes, if their files are older than a day."""
    entries = home.filesystem.get_file_info(pafs.FileSelector(home.path))
    folders = [info for info in entries if info.type == pafs.FileType.Directory]
    for name in (info.base_name for info in folders if info.base_name != current):
        inside = pafs.FileSelector((home / name).path, recursive=True, allow_not_found=True)
        times = [info.mtime_ns or 0 for info in home.filesystem.get_file_info(inside)]
        if times and max(times) / 1e9 < time.time() - _STALE_SECONDS:
            home.delete(name)
