"""The name of a prepared data set: a hash of everything that determines its content."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from ..config.places import locates
from ..config.recipe import Recipe
from .contents import describe_files, describe_tokenizer
from .curation.plan import plan_stages
from .render_settings import RenderSettings
from .resolve import ResolvedData, ResolvedSource, resolve_data
from .window_plan import plan_facts

FORMAT_VERSION = 7
"""Increased when a new version prepares the same inputs differently."""


@locates
def fingerprint(recipe: Recipe, data: ResolvedData | None = None) -> str:
    """Hash the content of the sources and the tokenizer, and the settings that determine how
    rows become sequences; returns 16 hex digits.

    What identifies a file, `describe_files` says.
    Paths and training settings do not count.

    Args:
        recipe: the recipe.
        data: its sources, if they are resolved already.

    Raises:
        InputError: a source or the model does not exist.
    """
    data = data or resolve_data(recipe)
    render = asdict(RenderSettings.of(recipe))
    del render["base"], render["revision"], render["trust_remote_code"], render["rows"]
    facts = {
        "version": FORMAT_VERSION,
        "train": _describe(data.train, not recipe.data.streams),
        "eval": _describe(data.eval, True),
        "render": render,
        "method": recipe.method.kind,
        "columns": recipe.method.columns,
        "packing": recipe.packs,
        "max_row_bytes": recipe.data.max_row_bytes,
        "holdout": recipe.data.held_out_share,
        "tokenizer": describe_tokenizer(recipe.model),
    }
    if recipe.data.streams:
        facts["streaming"] = plan_facts(recipe)
    if recipe.data.is_curated:
        mix = recipe.data.mix
        facts["curation"] = [plan_stages(recipe, data)[-1].key, mix and mix.model_dump()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def content_of(source: ResolvedSource, at_once: bool) -> str:
    """A hash of what identifies the content of a source's files.

    Args:
        source: the source.
        at_once: see `describe_files`.
    """
    facts = json.dumps(describe_files(source.files, at_once))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def contents_of(recipe: Recipe) -> dict[str, str]:
    """`content_of` each source of a recipe, by its path.

    Raises:
        InputError: see `resolve_data`.
    """
    data, at_once = resolve_data(recipe), not recipe.data.streams
    train = {source.path: content_of(source, at_once) for source in data.train}
    return {**{source.path: content_of(source, True) for source in data.eval}, **train}


def _describe(sources: Sequence[ResolvedSource], at_once: bool) -> list[object]:
    return [
        [source.format, source.weight, describe_files(source.files, at_once), source.changes.facts]
        for source in sources
    ]
