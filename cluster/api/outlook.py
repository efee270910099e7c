"""What a run would read, hold and do, computed without starting it."""

from dataclasses import asdict
from typing import Any

from ...training.common.storage import Folder
from ...training.config.places import locates
from ...training.config.recipe import Recipe
from ...training.data.inspection import SourceInspection
from ...training.data.prepare import find_prepared
from ...training.data.prepared import CUT, STREAMED, Prepared, remarks
from ...training.data.rendering import OVERLONG
from ...training.data.resolve import resolve_data
from ...training.data.sample import SampleFigures, measure_sample
from ...training.data.window_plan import WindowPlan
from ...training.inspection import Inspection, check_log, check_storage, inspect_recipe
from ...training.records.resume import RunState
from ...training.records.run_folder import PREPARED_FOLDER
from ...training.rehearsal.child import Rehearsal
from ...training.rehearsal.outcome import Outcome
from ...training.run import (
    at_earlier_commits,
    check_enough,
    packed_before,
    prepare_here,
    run_folder,
    state_of_run,
)
from ..memory_fit import memory_text
from ..preflight import room_here

_TRIED_BYTES = 4 * 2**20
"""Data up to this size is prepared by a check; it takes seconds."""
_TYPICAL_FILL = 0.98
"""Share of a packed sequence that holds tokens."""
_BEFORE_CURATION = (
    "rows and tokens are those before curation; finray data report shows what it drops"
)


def examine(recipe: Recipe, *, fresh: bool = False, longer: bool = False) -> dict[str, Any]:
    """Everything that can be said of a run before it starts, as plain values.

    Small data is prepared, so that its figures are exact and all its faults are reported; of large
    data the first rows are read.

    Raises:
        InputError: as a run would raise before its first step.
    """
    if not fresh:
        recipe = at_earlier_commits(recipe)
    inspection = inspect_recipe(recipe)
    check_storage(recipe)
    check_log(recipe)
    state = RunState(run_folder(recipe), None) if fresh else state_of_run(recipe, longer=longer)
    with Rehearsal(recipe, only_cached=True) as rehearsal:
        outcome = rehearsal.outcome()
    recipe = _settled(recipe, outcome, state)
    data = _data_of(recipe, inspection)
    sequences = data["sequences"]
    if data["is_exact"]:
        recipe = recipe.with_longest(data["lengths"].get("1"))
    return {
        "name": recipe.name,
        "method": recipe.method.kind,
        "base": recipe.model.base,
        "workers": recipe.scale.workers,
        "sources": [
            *(_source(source, "train") for source in inspection.train),
            *(_source(source, "eval") for source in inspection.eval),
        ],
        "data": data,
        "batch_size": recipe.optim.batch_size,
        "steps": None if sequences is None else recipe.total_steps(sequences),
        **_of_the_model(recipe, inspection, outcome),
        "rehearsal": outcome.as_record(recipe),
        "folder": f"{recipe.storage}/{recipe.name}",
        "state": state.describe(),
    }


def data_outlook(recipe: Recipe) -> dict[str, Any]:
    """Tokens and sequences of a recipe's data: exact if it is prepared or small, else estimated.

    The model's weights, and vLLM, may be elsewhere.

    Raises:
        InputError: the data is wrong, or there is none.
    """
    return _data_of(recipe, inspect_recipe(recipe, trains_here=False))


def _data_of(recipe: Recipe, inspection: Inspection) -> dict[str, Any]:
    figures = _figures_of(recipe, inspection)
    notes = [*inspection.notes, *figures.get("notes", ())]
    return {**figures, "notes": notes} if inspection.notes else figures


def _figures_of(recipe: Recipe, inspection: Inspection) -> dict[str, Any]:
    prepared = find_prepared(recipe, Folder(recipe.storage) / PREPARED_FOLDER)
    if prepared is None:
        if recipe.data.streams:  # a file may be larger than a window
            WindowPlan(recipe, resolve_data(recipe))
        if inspection.bytes > _TRIED_BYTES or inspection.model_folder is None:
            return _estimated(recipe, inspection)
        prepared = prepare_here(recipe)
    check_enough(recipe, prepared)
    if (prepared.manifest.windows or 1) > 1:  # of which one is measured
        return _estimated(recipe, inspection)
    return _measured(prepared)


def _source(source: SourceInspection, split: str) -> dict[str, Any]:
    return {
        "split": split,
        "path": source.path,
        "format": source.format,
        "files": source.files,
        "bytes": source.bytes,
        "rows": source.rows,
        "is_exact": source.is_exact,
        "unread_splits": list(source.unread_splits),
    }


def _measured(prepared: Prepared) -> dict[str, Any]:
    manifest = prepared.manifest
    return {
        "is_exact": True,
        "tokens": manifest.train.tokens,
        "sequences": manifest.train.sequences,
        "trained_share": manifest.train.trainable_tokens / manifest.train.tokens,
        "overlong": manifest.dropped.get(OVERLONG, 0) + manifest.notes.get(CUT, 0),
        "lengths": manifest.length_quantiles,
        "max_length": manifest.max_length,
        "notes": remarks(manifest.summary()),
        "funnel": list(manifest.funnel),
    }


def _estimated(recipe: Recipe, inspection: Inspection) -> dict[str, Any]:
    """Estimated from the first rows of each source; None if there is no tokenizer."""
    values: dict[str, Any] = {"is_exact": False, "tokens": None, "sequences": None}
    if inspection.model_folder is not None:
        figures = measure_sample(recipe)
        values |= _totals(recipe, inspection, figures)
        values |= {
            "sample": figures.rows,
            "trained_share": figures.trained_share,
            "overlong": figures.overlong,
            "lengths": figures.lengths,
            "max_length": recipe.row_length,
            "notes": remarks({"unused": figures.unused, "in_train_too": figures.in_train_too}),
        }
    if recipe.data.streams:
        values |= {"streams": True, "notes": [*values.get("notes", ()), STREAMED]}
    if recipe.data.is_curated:
        values["notes"] = [*values.get("notes", ()), _BEFORE_CURATION]
    return values


def _totals(recipe: Recipe, inspection: Inspection, figures: SampleFigures) -> dict[str, Any]:
    """Tokens and sequences of all rows, as many to a row as the first ones have; none if no first
    row fits."""
    tokens = documents = 0.0
    sources = zip(recipe.data.train, inspection.train, figures.train, strict=True)
    for source, inspected, first in sources:
        share = source.weight * (1 - recipe.data.held_out_share)
        of_one = share * inspected.rows / max(1, first.rows)
        tokens += first.tokens * of_one
        documents += first.documents * of_one
    if not documents:
        return {}
    packed = max(1, round(tokens / (recipe.data.max_length * _TYPICAL_FILL)))
    whole = max(1, round(documents))
    return {"tokens": round(tokens), "sequences": min(packed, whole) if recipe.packs else whole}


@locates
def _settled(recipe: Recipe, outcome: Outcome, state: RunState) -> Recipe:
    return outcome.settle(recipe, packed_before(state.record))


def _of_the_model(recipe: Recipe, inspection: Inspection, outcome: Outcome) -> dict[str, Any]:
    """Computed from the model's configuration; None for a hub model that is not on this machine."""
    if inspection.model_folder is None:
        return {"parameters": None, "adapted": None, "memory": None}
    from ...training.models import import_peft  # noqa: F401 - before what loads peft
    from ...training.models.loading import build_meta_model, count_parameters
    from ...training.models.memory_estimate import estimate, sizes_of
    from ...training.models.placement import decide
    from ...training.models.targets import coverage_of

    model = build_meta_model(recipe, recipe.method.head, outcome.left_out)
    sizes, room = sizes_of(recipe, model), room_here(recipe)
    if room is not None:
        recipe = decide(recipe, sizes, room)
    memory = estimate(recipe, sizes, None if room is None else room.compute)
    values = {
        "peak": memory.peak,
        "phases": memory.phases,
        **asdict(memory),
        "text": memory_text(memory, recipe),
    }
    adapted = coverage_of(model)
    return {"parameters": count_parameters(model), "adapted": adapted, "memory": values}
