"""`finray prepare`: a recipe's data, prepared without training."""

import argparse
import json
from contextlib import nullcontext
from typing import Any

from ...training.common import formatting
from ...training.run import prepare_data, prepares_on_ray
from ..environment import worker_environment
from ..launcher import open_ray
from ..nodes.ray_session import cluster_address
from .check import recipe_of
from .screens.progress import ProgressWatcher


def prepare(options: argparse.Namespace) -> None:
    """Prepare a recipe's data."""
    recipe = recipe_of(options)
    env = worker_environment(recipe)
    on_ray = prepares_on_ray(recipe)
    address = cluster_address(options.address)
    with ProgressWatcher() as watcher:
        ray = open_ray(recipe, watcher, address, env, options.verbose) if on_ray else nullcontext()
        with ray:
            prepared = prepare_data(recipe, watcher)
    summary = prepared.manifest.summary()
    if options.json:
        print(json.dumps({"folder": str(prepared.folder), **summary}, indent=2))
    else:
        print(render_data(summary))
        print(f"prepared data: {prepared.folder}")


def render_data(summary: dict[str, Any]) -> str:
    """The numbers of a prepared data set as text; `summary` as `Manifest.summary` returns it."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items())
    lines = [f"  {'rows read':10}  {formatting.count(summary['rows_read'])}"]
    lines.append(f"  {'dropped':10}  {dropped or 'none'}")
    for name in ("train", "eval"):
        split = summary[name]
        if split is not None:
            lines.append(
                f"  {name:10}  {formatting.count(split['sequences'])} sequences of "
                f"{formatting.count(split['documents'])} documents, "
                f"{formatting.count(split['tokens'])} tokens "
                f"({formatting.count(split['trainable_tokens'])} trained), "
                f"{formatting.percent(split['fill'])} full"
            )
    return "\n".join(lines)
