"""Writes README.md of an exported result: a model card for the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..common import formatting
from ..config.methods import title_of
from ..records.labels import key_metrics, label_of
from ..records.report import data_statistics
from ..records.run_folder import Record
from .loading import ExportedModel

_PLACE = re.compile(r"(/|[A-Za-z][A-Za-z0-9+.-]*://)[^\n]*")


def render_card(run: Record, recipe: Record, result: ExportedModel) -> str:
    """The model card: method and base, metrics, data, recipe, and code that loads the model.

    It names no folder of this machine and no storage address: they are useless to other people and
    may be private.

    Args:
        run: values of run.json.
        recipe: values of recipe.yaml.
        result: the exported model.
    """
    run, recipe = _without_places(run), _without_places(recipe)
    environment = Environment(
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters["cell"] = _cell
    return environment.get_template("model_card.jinja").render(
        header=_yaml(_header(run, recipe, result)),
        name=str(run.get("name")),
        facts=_facts(run, recipe, result),
        program=result.program(),
        metrics=_metrics(run),
        data=data_statistics(run),
        recipe=_yaml(recipe),
        versions=sorted((run.get("versions") or {}).items()),
    )


def _header(run: Record, recipe: Record, result: ExportedModel) -> Record:
    method = str(run.get("method"))
    adapter = recipe.get("adapter")
    tags = ["finray", method]
    if result.kind != "model":
        tags.append(str((adapter or {}).get("kind", "lora")))
    header: Record = {
        "library_name": "peft" if result.kind == "adapter" else "transformers",
        "pipeline_tag": _pipeline(result),
        "tags": tags,
    }
    if result.base_is_public:
        relation = "adapter" if result.kind == "adapter" else "finetune"
        header.update(base_model=result.base, base_model_relation=relation)
    return header


def _pipeline(result: ExportedModel) -> str:
    if result.is_classifier:
        return "text-classification"
    is_vision = result.model_class == "AutoModelForImageTextToText"
    return "image-text-to-text" if is_vision else "text-generation"


def _facts(run: Record, recipe: Record, result: ExportedModel) -> list[tuple[str, str]]:
    """Labels and texts on the method, the base model and the result."""
    method = str(run.get("method"))
    base = f"`{Path(result.base).name}` (a local folder)"
    if result.base_is_public:
        base = f"[{result.base}](https://huggingface.co/{result.base})"
        base += f" at `{result.revision}`" if result.revision else ""
    kind = {
        "adapter": "adapter, to be loaded on the base model",
        "merged": "adapter merged into the base model",
        "model": "model, trained without an adapter",
    }[result.kind]
    if result.kind == "merged" and result.quantize != "none":
        kind += f", dequantised from the {result.quantize} weights that it was trained on"
    facts = [("Method", title_of(method)), ("Base model", base), ("Result", kind)]
    if result.stored != "none":
        facts.append(("Weights", f"{result.stored}, as bitsandbytes stores them"))
    adapter = recipe.get("adapter") or {}
    settings = {key: value for key, value in adapter.items() if value not in (None, {}, [])}
    if settings:
        facts.append(("Adapter", ", ".join(f"{key} {value}" for key, value in settings.items())))
    steps, tokens = formatting.count(run.get("step")), formatting.count(run.get("tokens"))
    facts.append(("Trained for", f"{steps} steps over {tokens} tokens"))
    return facts


def _metrics(run: Record) -> list[tuple[str, str, str]]:
    """Rows (measure, before, after), with the key metrics first."""
    before, after = run.get("before") or {}, run.get("metrics") or {}
    names = dict.fromkeys([*key_metrics(before, after), *sorted(before.keys() | after.keys())])
    return [
        (label.title, label.write(before.get(name)), label.write(after.get(name)))
        for name, label in ((name, label_of(name)) for name in names)
        if formatting.is_number(before.get(name)) or formatting.is_number(after.get(name))
    ]


def _without_places(value: Any) -> Any:
    """Values with every local path or URI shortened to its last part; public data sets stay."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and _PLACE.fullmatch(value) and not value.startswith("hf://"):
        name = value.partition("?")[0].rstrip("/").rpartition("/")[2]
        return name.rpartition("@")[2]  # of s3://key:secret@bucket
    return value


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return formatting.one_line(text).replace("|", "\\|")


def _yaml(values: Record) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
