"""`finray check`: what a run would read, hold and do, told before any of it happens."""

from dataclasses import asdict
from typing import Any

from ...training.common import formatting as figures
from ...training.common.storage import Folder
from ...training.config.recipe import Recipe
from ...training.data.fingerprint import fingerprint
from ...training.data.inspection import SourceInspection
from ...training.data.prepared import Prepared, open_prepared
from ...training.inspection import Inspection, inspect_recipe
from ...training.records.run_folder import PREPARED_FOLDER
from ..gpus import memory_text

_TYPICAL_FILL = 0.98


def examine(recipe: Recipe) -> dict[str, Any]:
    """Everything that can be told of a recipe without running it, as plain values.

    Raises:
        InputError: whatever a run would refuse before it loads a model.
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


def render(outlook: dict[str, Any]) -> str:
    """The outlook for people."""
    data, parameters = outlook["data"], outlook["parameters"]
    about = "" if data["is_exact"] else "about "
    rows = [("run", f"{outlook['name']}, {outlook['method']} of {outlook['base']}")]
    for source in outlook["sources"]:
        words = "" if source["is_exact"] else "about "
        rows.append(
            (
                source["split"],
                f"{source['path']}: {words}{figures.count(source['rows'])} rows of "
                f"{source['format']}, {source['files']} file{'s'[: source['files'] != 1]}",
            )
        )
    if data["tokens"] is not None:
        rows.append(
            (
                "tokens",
                f"{about}{figures.count(data['tokens'])} in "
                f"{figures.count(data['sequences'])} sequences"
                + ("" if data["is_exact"] else " (exact once prepared: finray prepare)"),
            )
        )
    if outlook["steps"] is not None:
        steps = f"{about}{figures.count(outlook['steps'])}"
        rows.append(("steps", f"{steps} of {outlook['batch_size']} sequences"))
    if parameters is not None:
        share = parameters["trainable"] / parameters["total"]
        rows.append(
            (
                "parameters",
                f"{figures.count(parameters['trainable'])} trained of "
                f"{figures.count(parameters['total'])} ({figures.percent(share)})",
            )
        )
    if outlook["memory"] is not None:
        rows.append(("memory", outlook["memory"]["text"]))
    workers = outlook["workers"]
    count = " to ".join(map(str, workers)) if isinstance(workers, tuple) else workers
    where = f"{count} workers" if workers else "this process"
    rows += [("trains in", where), ("results in", outlook["folder"])]
    rows += [(line["name"], line["text"]) for line in outlook.get("cluster", ())]
    return "\n".join(["the recipe is good", *(f"  {name:10}  {text}" for name, text in rows)])


def render_data(summary: dict[str, Any]) -> str:
    """A prepared data set's figures for people; `summary` as `Manifest.summary` gives it."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items())
    lines = [f"  {'rows read':10}  {figures.count(summary['rows_read'])}"]
    lines.append(f"  {'dropped':10}  {dropped or 'none'}")
    for name in ("train", "eval"):
        split = summary[name]
        if split is not None:
            lines.append(
                f"  {name:10}  {figures.count(split['sequences'])} sequences of "
                f"{figures.count(split['documents'])} documents, "
                f"{figures.count(split['tokens'])} tokens "
                f"({figures.count(split['trainable_tokens'])} bear loss), "
                f"{figures.percent(split['fill'])} full"
            )
    return "\n".join(lines)


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
    """From the first rows of each source; None where there is no tokenizer to count with."""
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
    """From the model's configuration; None for a hub model that is not on this machine."""
    if inspection.model_folder is None:
        return {"parameters": None, "memory": None}
    from ...training.models.loading import count_parameters, without_weights
    from ...training.models.memory_estimate import estimate, sizes_of

    model = without_weights(recipe, recipe.method.head)
    memory = estimate(recipe, sizes_of(recipe, model))
    told = {"peak": memory.peak, **asdict(memory), "text": memory_text(memory, recipe)}
    return {"parameters": count_parameters(model), "memory": told}
