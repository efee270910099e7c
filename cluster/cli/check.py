"""`finray check`: what a run would read, hold and do, without starting it."""

import argparse
import json
import sys
from contextlib import redirect_stdout

from ..api.runs import check as examine
from ..screens.check import render


def check(options: argparse.Namespace) -> None:
    """Validate a recipe and its data, and print what a run would do."""
    with redirect_stdout(sys.stderr):  # what the user's code writes in any way
        outlook = examine(
            options.recipe,
            options.overrides,
            local=options.local,
            address=options.address,
            wait_for_nodes=options.wait_for_nodes,
            fresh=options.fresh,
            longer=options.longer,
            verbose=options.verbose,
            quiet=options.quiet,
        )
    print(json.dumps(outlook, indent=2) if options.json else render(outlook))
