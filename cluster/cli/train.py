"""`finray train`: train, or continue an unfinished run."""

import argparse
import json
import sys

from ..api.runs import train as run_to_the_end


def train(options: argparse.Namespace) -> None:
    """Train, or continue an unfinished run."""
    run = run_to_the_end(
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
    if options.json:
        print(json.dumps(run.record, indent=2))
    else:
        print(run.summary(colour=sys.stdout.isatty()))
