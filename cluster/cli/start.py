"""`finray import`: a recipe from another project's configuration."""

import argparse
import json
import sys
from dataclasses import asdict

from ...training.common.errors import InputError
from ..api.starting import import_recipe
from ..screens.imported import render


def import_(options: argparse.Namespace) -> None:
    """Print a recipe made from another project's settings, or write it; the report goes to stderr.

    Raises:
        InputError: nothing can be imported, or the recipe still has faults.
    """
    imported = import_recipe(
        options.source,
        gpus=options.gpus,
        to=options.to,
        dataset_info=options.dataset_info,
        method=options.method,
    )
    values = asdict(imported)
    if options.json:
        print(json.dumps(values, indent=2))
    elif options.to is None:
        print(imported.text, end="")
    else:
        print(options.to)
    if not options.quiet and not options.json:
        print(render(values), file=sys.stderr)
        if options.to is not None:
            print(f"next: finray check {options.to}", file=sys.stderr)
    if imported.faults is not None:
        raise InputError(f"the recipe is not valid yet:\n{imported.faults}")
