"""`finray check`: what a run would read, hold and do, without starting it."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from ...training.common.storage import Folder
from ...training.config.recipe import Recipe, load_recipe
from ...training.config.user_code import try_import
from ...training.data.fingerprint import fingerprint
from ...training.data.inspection import SourceInspection
from ...training.data.prepared import Prepared, open_prepared
from ...training.inspection import Inspection, inspect_recipe
from ...training.records.run_folder import PREPARED_FOLDER
from ..environment import worker_environment
from ..gpus import memory_text
from ..launcher import open_ray
from ..preflight import try_running_cluster
from .screens.check import render
from .screens.progress import ProgressWatcher

_TYPICAL_FILL = 0.98
"""Share of a packed sequence that holds tokens."""


def check(options: argparse.Namespace) -> None:
    """Validate a recipe and its data, and print what a run would do."""
    recipe = recipe_of(options)
    outlook = examine(recipe)
    try_import(recipe)
    if options.address and recipe.scale.most_workers:
        address, env = options.address, worker_environment(recipe)
        with ProgressWatcher() as watcher, open_ray(recipe, watcher, address, env, options.verbose):
            lines = try_running_cluster(recipe, address, options.wait_for_nodes).lines
        outlook["cluster"] = [asdict(line) for line in lines]
    print(json.dumps(outlook, indent=2) if options.json else render(outlook))


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the arguments of `check`, `prepare` or `train` name."""
    local = ("scale.workers=0", "scale.strategy=auto") if options.local else ()
    return load_recipe(options.recipe, (*options.overrides, *local))


def examine(recipe: Recipe) -> dict[str, Any]:
    """Everything that is known of a recipe without running it, as plain values.

    Raises:
        InputError: as a run would raise before it loads a model.
    """
    inspection = inspect_recipe(recipe)
    prepared = open_prepared(Folder(recipe.storage) / PREPARED_FOLDER / fingerprint(recipe))
    data = _measured(prepared) if prepared else _estimated(recipe, inspection)
    sequences = data["sequences"]
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
        **_of_the_model(recipe, inspection),
        "folder": f"{recipe.storage}/{recipe.name}",
    }


def _source(source: SourceInspection, split: str) -> dict[str, Any]:
    return {
        "split": split,
        "path": source.path,
        "format": source.format,
        "files": source.files,
        "bytes": source.bytes,
        "rows": source.rows,
        "is_exact": source.is_exact,
    }


def _measured(prepared: Prepared) -> dict[str, Any]:
    train = prepared.manifest.train
    return {"is_exact": True, "tokens": train.tokens, "sequences": train.sequences}


def _estimated(recipe: Recipe, inspection: Inspection) -> dict[str, Any]:
    """Estimated from the first rows of each source; None if there is no tokenizer."""
    weights = [source.weight * (1 - recipe.data.holdout) for source in recipe.data.train]
    pairs = list(zip(inspection.train, weights, strict=True))
    counts = [source.tokens for source, _ in pairs]
    if None in counts:
        return {"is_exact": False, "tokens": None, "sequences": None}
    tokens = round(sum((source.tokens or 0) * weight for source, weight in pairs))
    rows = round(sum(source.rows * weight for source, weight in pairs))
    packed = max(1, round(tokens / (recipe.data.max_length * _TYPICAL_FILL)))
    sequences = min(packed, rows) if recipe.packs else rows
    return {"is_exact": False, "tokens": tokens, "sequences": sequences}


def _of_the_model(recipe: Recipe, inspection: Inspection) -> dict[str, Any]:
    """Computed from the model's configuration; None for a hub model that is not on this machine."""
    if inspection.model_folder is None:
        return {"parameters": None, "memory": None}
    from ...training.models.loading import build_meta_model, count_parameters
    from ...training.models.memory_estimate import estimate, sizes_of

    model = build_meta_model(recipe, recipe.method.head)
    memory = estimate(recipe, sizes_of(recipe, model))
    values = {"peak": memory.peak, **asdict(memory), "text": memory_text(memory, recipe)}
    return {"parameters": count_parameters(model), "memory": values}
