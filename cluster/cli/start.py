"""`finray init` and `finray import`: a first recipe from data, or from another project."""

import argparse
import json
import sys
from dataclasses import asdict

from ...training.common.errors import InputError
from ...training.inspection import inspect_recipe
from ..api.recipes import load_recipe
from ..api.runs import check as examine
from ..api.starting import import_recipe, init_recipe
from ..screens.check import render as render_check
from ..screens.imported import render


def init(options: argparse.Namespace) -> None:
    """Write a recipe from data, model and machine, check it, and print what it would do.

    Raises:
        InputError: the data is wrong; or what is written does not pass the check.
    """
    made = init_recipe(
        options.data,
        to=options.to,
        model=options.model,
        method=options.method,
        rewards=options.reward,
    )
    print(options.to)
    if not options.quiet:
        for note in made.notes:
            print(f"note: {note}", file=sys.stderr)
    if made.fault is not None:
        raise InputError(
            f"{made.fault}; {options.to} is written: correct that in it, or name another --model, "
            f"then run: finray check {options.to}"
        )
    try:
        if made.has_model:
            checked = render_check(examine(options.to, quiet=options.quiet))
        else:
            inspect_recipe(load_recipe(options.to))
            checked = "recipe and rows OK; the model is checked once it is on this machine"
    except InputError as error:
        raise InputError(f"{error}\n{options.to} is written; correct it, and check it") from None
    if not options.quiet:
        print(checked, file=sys.stderr)
        print(f"next: finray train {options.to}", file=sys.stderr)


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
