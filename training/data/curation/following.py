"""Follows single rows through the stages of a recipe, to say which one drops them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, tee

from ...common.storage import Folder
from ...config.recipe import Recipe
from ..reading import first_line, read_chunk
from ..render_settings import RenderSettings
from ..resolve import ResolvedData
from ..row_changes import change_rows
from ..rows import BadRow, Row
from ..shapes import RowError
from .curate import TrainChunk, train_chunks
from .decontaminate import REFERENCE
from .files import MANIFEST, STAGES, held_in, left_in, scores_in
from .passes import READ, group_of, may_be_foreign
from .plan import DEDUPLICATE, HOLDOUT, SCORE, PlannedStage, plan_stages
from .scoring import LOW
from .stage import Item, StageContext
from .stages import ROW_STAGES


@dataclass(frozen=True)
class Followed:
    """What becomes of a row."""

    place: str
    """file:line"""
    row: Row | BadRow
    """As the last stage leaves it."""
    facts: tuple[str, ...] = ()
    """What stages do with it, but for dropping it."""
    dropped: str = ""
    """Which stage drops it, and why."""


class Stages:
    """The stages of a recipe, for single rows.

    Args:
        recipe: the recipe, with stages.
        data: its sources.
        folder: <storage>/prepared, where finished stages are.
    """

    def __init__(self, recipe: Recipe, data: ResolvedData, folder: Folder) -> None:
        self._recipe = recipe
        self._folder = folder / STAGES
        self._stages = plan_stages(recipe, data)
        self._chunks = train_chunks(recipe, data)

    def first_rows(self, source: int, most: int) -> Iterator[Followed]:
        """What becomes of the first rows of a training source; those that its function leaves out
        do not appear."""
        chunks = [chunk for chunk in self._chunks if chunk.source == source]
        return islice((row for chunk in chunks for row in self._of_chunk(chunk)), most)

    def _of_chunk(self, chunk: TrainChunk) -> Iterator[Followed]:
        limit = self._recipe.data.max_row_bytes
        before = first_line(chunk.chunk) - 1
        own, rows = tee(read_chunk(chunk.chunk, limit).rows)
        changed = zip(own, change_rows(rows, chunk.changes), strict=True)
        for index, ((_, original), (line, row)) in enumerate(changed):
            if row is None:
                continue
            place = f"{chunk.chunk.file.place}:{before + line}"
            if isinstance(row, BadRow):
                yield Followed(place, row)
                continue
            try:
                group = group_of(self._recipe.data.grouped_by, original, row)
                item = Item.read(index, line, row, chunk.reading, group)
                if may_be_foreign(chunk.chunk, chunk.changes):
                    item = item.as_json(chunk.reading)
            except RowError as error:
                yield Followed(place, row, dropped=f"not usable: {error}")
                continue
            yield self._follow(item, chunk, place)

    def _follow(self, item: Item, chunk: TrainChunk, place: str) -> Followed:
        facts: list[str] = []
        for number, stage in enumerate(self._stages, start=1):
            name = f"{number} {stage.kind}"
            if not self._can_decide(stage):
                facts.append(f"{name} not done yet: finray data report")
                break
            if stage.kind in ROW_STAGES:
                context = StageContext(RenderSettings.of(self._recipe), self._folder / stage.key)
                outcome = ROW_STAGES[stage.kind](stage.settings, context)([item])[0]
                if (why := outcome.dropped or outcome.bad) is not None:
                    why += f" ({outcome.language})" if outcome.language else ""
                    return Followed(place, item.row, tuple(facts), f"dropped by {name}: {why}")
                if outcome.row is not None:
                    facts.append(f"changed by {name}")
                    try:
                        item = item.with_row(outcome.row, chunk.reading)
                    except RowError as error:
                        return Followed(
                            place, outcome.row, tuple(facts), f"dropped by {name}: {error}"
                        )
            elif stage.kind != READ:
                fact, why = self._among_all(stage, chunk.number, item.index)
                facts += [fact] if fact else []
                if why:
                    return Followed(place, item.row, tuple(facts), f"dropped by {name}: {why}")
        return Followed(place, item.row, tuple(facts))

    def _among_all(self, stage: PlannedStage, chunk: int, index: int) -> tuple[str, str]:
        """(fact, why it is dropped) of a row in a finished stage that compares all rows."""
        folder = self._folder / stage.key
        if stage.kind == HOLDOUT:
            return ("held out" if held_in(folder, chunk).get(index) else ""), ""
        is_left = index in left_in(folder, chunk)
        if stage.kind == DEDUPLICATE:
            return "", "" if is_left else "it is equal or nearly equal to an earlier row"
        assert stage.kind == SCORE
        rows = scores_in(self._folder / stage.scores, chunk)
        scores = rows.scores[rows.index == index]
        if len(scores) == 0:
            return "", "it has no score, as finray data report says"
        return f"score {scores[0]:.4g}", "" if is_left else LOW

    def _can_decide(self, stage: PlannedStage) -> bool:
        """True if the stage needs no other row, or is finished."""
        if stage.references:
            return (self._folder / stage.key).exists(REFERENCE)
        return stage.kind == READ or stage.decides_by_row or self._is_finished(stage)

    def _is_finished(self, stage: PlannedStage) -> bool:
        return (self._folder / stage.key).exists(MANIFEST)
