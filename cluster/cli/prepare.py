"""`finray prepare`: a recipe's data, prepared without training."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from ...training.common import formatting
from ...training.data.curation.funnel import describe_funnel
from ...training.data.prepared import remarks
from ...training.data.row_facts import describe_lengths
from ..api.runs import prepare as prepare_data


def prepare(options: argparse.Namespace) -> None:
    """Prepare a recipe's data."""
    with redirect_stdout(sys.stderr):  # what the user's code writes in any way
        prepared = prepare_data(
            options.recipe,
            options.overrides,
            local=options.local,
            address=options.address,
            verbose=options.verbose,
            quiet=options.quiet,
        )
    if options.json:
        print(json.dumps({"folder": prepared.folder, **prepared.summary}, indent=2))
    else:
        print(render_data(prepared.summary))
        print(f"prepared data: {prepared.folder}")


def render_data(summary: dict[str, Any]) -> str:
    """The numbers of a prepared data set as text; `summary` as `Manifest.summary` returns it."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items())
    lines = [f"  {'rows read':10}  {formatting.count(summary['rows_read'])}"]
    lines.append(f"  {'dropped':10}  {dropped or 'none'}")
    lines.append(
        f"  {'lengths':10}  {describe_lengths(summary['length_quantiles'], summary['max_length'])}"
    )
    lines += [f"  {'curated':10}  {line}" for line in describe_funnel(summary["funnel"])]
    lines += [f"  {'note':10}  {remark}" for remark in remarks(summary)]
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
