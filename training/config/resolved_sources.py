"""Makes the sources of a recipe independent of the current folder, and writes out short ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .curation import DecontaminateStage, KeepStage, ScoreStage
from .llama_factory import named_source
from .paths import is_folder, resolve_path
from .places import about
from .rewards import resolve_run
from .sections import DataSettings
from .source import Source


def resolve_sources(data: DataSettings, places: Sequence[Path]) -> dict[str, list[Any]]:
    """The sources for training and for evaluation, and the stages, with absolute paths.

    Args:
        data: the recipe's section.
        places: folders in which a run is searched; relative paths start in the first.

    Raises:
        InputError: a file of code or dataset_info.json cannot be used, data.eval names a split
            of training data that has none, or there is no such run.
    """
    folder = places[0]
    train = _resolve_all(data.train, folder, "data.train")
    held_out = [
        written
        for index, source in enumerate(data.eval)
        for written in ([source] if source.place else _splits_of(train, source, index))
    ]
    return {
        "train": train,
        "eval": _resolve_all(held_out, folder, "data.eval"),
        "curate": [
            _resolve_stage(stage, places, f"data.curate.{index}")
            for index, stage in enumerate(data.curate)
        ],
    }


def _resolve_stage(stage: Any, places: Sequence[Path], key: str) -> Any:
    folder = places[0]
    if isinstance(stage, KeepStage | ScoreStage) and stage.function is not None:
        return stage.model_copy(update={"with": stage.function.resolve(folder, f"{key}.with")})
    if isinstance(stage, ScoreStage) and stage.run is not None:
        return stage.model_copy(update={"run": resolve_run(stage.run, places, f"{key}.run")})
    if isinstance(stage, DecontaminateStage):
        against = _resolve_all(stage.against, folder, f"{key}.against")
        return stage.model_copy(update={"against": against})
    return stage


def _resolve_all(sources: Sequence[Source], folder: Path, key: str) -> list[Source]:
    return [_resolve(source, folder, f"{key}.{index}") for index, source in enumerate(sources)]


def _resolve(source: Source, folder: Path, key: str) -> Source:
    if source.map is not None:
        source = source.model_copy(update={"map": source.map.resolve(folder, f"{key}.map")})
    with about(key):
        if source.dataset_info is not None:
            source = named_source(source, Path(resolve_path(source.dataset_info, folder)))
        path = source.path
        if source.dataset is not None and _is_folder(source.dataset, folder):
            path = source.dataset
        if path is None:
            return source
        if source.revision is not None:
            raise InputError(
                f"revision: {path} is a folder, which has no revisions; remove revision"
            )
        return source.model_copy(update={"path": resolve_path(path, folder), "dataset": None})


def _is_folder(dataset: str, folder: Path) -> bool:
    is_path = dataset.startswith((".", "/", "~")) or "://" in dataset
    return is_path or is_folder(folder / dataset)


def _splits_of(train: Sequence[Source], source: Source, index: int) -> list[Source]:
    """The split of each training source that may have some; what the evaluation source leaves out
    is as in training.

    Raises:
        InputError: all training sources are single files or globs.
    """
    written = source.model_dump(exclude_unset=True)
    splits = []
    for other in train:
        if other.path is not None and (Path(other.path).is_file() or _is_glob(other.path)):
            continue
        changes = {"weight": 1.0, "limit": None, **written, "map": source.map or other.map}
        splits.append(other.model_copy(update=changes))
    if not splits:
        raise InputError(
            f"data.eval.{index}: {train[0].place} has no splits, as it is not a folder or data "
            "set; name the evaluation data, or set data.holdout"
        )
    return splits


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[") and not is_folder(path)
