"""`finray data`: rows as the model sees them, and what curation takes of them."""

import argparse
import json
import sys
from contextlib import redirect_stdout

from ...training.common.errors import InputError, writing
from ...training.common.storage import Folder
from ...training.data.shown_rows import show_rows
from ...training.records.rows_page import render_page
from ...training.records.run_folder import PREPARED_FOLDER
from ..api.recipes import load_recipe
from ..api.runs import report_data
from ..screens.curation import render_curation
from ..screens.data import render_rows
from ..screens.runs import terminal_width


def report(options: argparse.Namespace) -> None:
    """Print what each stage drops of the rows."""
    with redirect_stdout(sys.stderr):  # what the user's code writes in any way
        outcome = report_data(
            options.recipe,
            options.overrides,
            local=options.local,
            address=options.address,
            verbose=options.verbose,
            quiet=options.quiet,
        )
    print(
        json.dumps(outcome, indent=2)
        if options.json
        else render_curation(outcome, terminal_width())
    )


def show(options: argparse.Namespace) -> None:
    """Print the first rows of each source, or write them as a page."""
    if options.rows < 1:
        raise InputError(f"--rows: expected at least 1, found {options.rows}; give a larger number")
    recipe = load_recipe(options.recipe, options.overrides)
    with recipe.locating(), redirect_stdout(sys.stderr):
        rows = show_rows(recipe, options.rows, Folder(recipe.storage) / PREPARED_FOLDER)
    if options.page is None:
        print(render_rows(rows, colour=sys.stdout.isatty()))
        return
    text = render_page(rows)
    with writing(f"--page {options.page}", "give another file"):
        # UTF-8 cannot encode a lone surrogate.
        options.page.write_bytes(text.encode("utf-8", "replace"))
    print(options.page)
