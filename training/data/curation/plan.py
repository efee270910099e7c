"""The stages of a recipe, each named by a hash of everything that determines its rows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...common.storage import Folder
from ...config.base_digest import file_digests
from ...config.curation import (
    DecontaminateStage,
    DeduplicateStage,
    FilterStage,
    KeepStage,
    NearDuplicates,
    ScoreStage,
    Stage,
)
from ...config.places import about
from ...config.recipe import Recipe
from ...config.source import KnownFormat
from ..contents import describe_files, describe_tokenizer, identified
from ..expand import expand
from ..resolve import ResolvedData
from ..row_changes import RowChanges
from ..sources import CHUNK_BYTES, SourceFile
from .passes import READ
from .stages import REWRITING, ROW_STAGES

_RESULT_FILES = (".safetensors", ".json", ".jinja")
VERSION = 5
"""Increased when a new version of a stage makes other rows of the same ones."""
_GROUP_VERSION = 2
"""Increased when rows get other groups from the same column."""
DEDUPLICATE, SCORE, HOLDOUT = "deduplicate", "score", "holdout"


@dataclass(frozen=True)
class ReferenceSource:
    """Evaluation data with which training rows are compared."""

    files: tuple[SourceFile, ...]
    changes: RowChanges
    format: KnownFormat | None
    """None: it is looked for in the first rows."""

    @property
    def facts(self) -> list[Any]:
        return [describe_files(self.files), self.changes.facts, self.format]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a recipe."""

    key: str
    """Name of its folder: a hash of what decides its rows, with all stages before it."""
    kind: str
    setting: str
    """The key in the recipe, for messages."""
    settings: Any
    """Its section of the recipe; None to read only."""
    references: tuple[ReferenceSource, ...] = ()
    scores: str = ""
    """Name of the folder of the rows' scores; stages share it that differ in the share alone."""

    @property
    def decides_by_row(self) -> bool:
        """True if it looks at one row after the other."""
        return self.kind == READ or self.kind in ROW_STAGES

    @property
    def rewrites(self) -> bool:
        return self.kind in REWRITING


@dataclass(frozen=True)
class GroupSettings:
    """What keeps rows on one side of a holdout."""

    share: float
    group_by: str | None
    near: NearDuplicates | None
    """None where an earlier stage leaves no near duplicates."""


def plan_stages(recipe: Recipe, data: ResolvedData) -> tuple[PlannedStage, ...]:
    """The stages of a recipe in their order, at least one; the first one reads rows.

    Raises:
        InputError: a source to compare with does not exist or cannot be read.
    """
    key = _digest(_first_facts(recipe, data))
    stages = []
    for kind, setting, settings in _declared(recipe):
        references = _references(recipe, data, settings, setting)
        scores = ""
        if isinstance(settings, ScoreStage):
            scores = _digest([key, "scores", _scorer_facts(settings, setting)])
        facts = [_facts(recipe, settings), [of.facts for of in references]]
        key = _digest([scores or key, kind, *facts])
        stages.append(PlannedStage(key, kind, setting, settings, references, scores))
    return tuple(stages)


def _declared(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """(kind, key in the recipe, settings) of each stage."""
    stages = recipe.data.curate
    if not stages or stages[0].kind in (DEDUPLICATE, SCORE):
        yield READ, "data.train", None
    for number, stage in enumerate(stages):
        yield stage.kind, f"data.curate.{number}", stage
    holdout = recipe.data.holdout
    if not isinstance(holdout, float):
        near = None if _leave_none(stages, NearDuplicates()) else NearDuplicates()
        yield HOLDOUT, "data.holdout", GroupSettings(holdout.share, holdout.group_by, near)


def _leave_none(stages: Sequence[Stage], near: NearDuplicates) -> bool:
    """True if no rows that are nearly equal are left: a stage drops them, and none makes others."""
    for stage in reversed(stages):
        if stage.kind in REWRITING:
            return False
        dropped = stage.near if isinstance(stage, DeduplicateStage) else None
        if dropped and dropped.jaccard <= near.jaccard and dropped.ngram == near.ngram:
            return True
    return False


def _first_facts(recipe: Recipe, data: ResolvedData) -> list[Any]:
    """What decides the rows before the first stage."""
    return [
        VERSION,
        CHUNK_BYTES,
        [
            [
                source.format,
                describe_files(source.files, not recipe.data.streams),
                source.changes.facts,
            ]
            for source in data.train
        ],
        recipe.method.kind,
        recipe.method.columns,
        recipe.data.max_row_bytes,
        recipe.data.grouped_by and [recipe.data.grouped_by, _GROUP_VERSION],
    ]


def _facts(recipe: Recipe, settings: Any) -> Any:
    """What decides the rows of a stage, beside those before it."""
    if settings is None:
        return None
    if isinstance(settings, GroupSettings):
        near = settings.near and settings.near.model_dump()
        return [settings.share, settings.group_by, near]
    if isinstance(settings, KeepStage):
        return [settings.function.name, settings.function.digest]
    if isinstance(settings, DecontaminateStage):
        return settings.ngram
    if isinstance(settings, ScoreStage):  # what scores is in the key of the scores
        return [settings.keep_top, settings.min]
    facts = settings.model_dump()
    if isinstance(settings, FilterStage) and settings.min_tokens is not None:
        facts["tokenizer"] = describe_tokenizer(recipe.model)
    return facts


def _scorer_facts(settings: ScoreStage, setting: str) -> Any:
    """What decides the scores of rows."""
    if settings.function is not None:
        return [settings.function.name, settings.function.digest]
    assert settings.run is not None
    run = Folder(settings.run)
    results = [run / name for name in ("adapter", "model") if run.exists(name)]
    with about(f"{setting}.run"):
        return [
            file_digests(result, [name for name in result.names() if name.endswith(_RESULT_FILES)])
            for result in results
        ]


def _references(
    recipe: Recipe, data: ResolvedData, settings: Any, setting: str
) -> tuple[ReferenceSource, ...]:
    if not isinstance(settings, DecontaminateStage):
        return ()
    references = [
        ReferenceSource(source.files, source.changes, source.format) for source in data.eval
    ]
    for index, source in enumerate(settings.against):
        with about(f"{setting}.against.{index}"):
            files = identified(expand(source).files)
        own = None if source.format == "auto" else source.format
        references.append(ReferenceSource(files, RowChanges.of(source), own))
    return tuple(references)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
