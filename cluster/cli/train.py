"""`finray train`: train, or continue an unfinished run."""

import argparse
import json
import sys

from ...training.common.background import Stop
from ...training.config.user_code import try_import
from ...training.inspection import inspect_recipe
from ...training.run import run_folder
from ...training.run import train as run_to_the_end
from ..launcher import choose_launcher
from .check import recipe_of
from .screens.progress import ProgressWatcher
from .screens.summary import render_summary


def train(options: argparse.Namespace) -> None:
    """Train, or continue an unfinished run."""
    recipe = recipe_of(options)
    inspect_recipe(recipe)
    try_import(recipe)
    stop = Stop()
    with ProgressWatcher() as watcher:
        place = choose_launcher(
            recipe,
            stop,
            watcher,
            address=options.address,
            verbose=options.verbose,
            wait_for_nodes=options.wait_for_nodes,
        )
        with place as launcher:
            record = run_to_the_end(recipe, launcher, watcher)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        print(render_summary(run_folder(recipe), colour=sys.stdout.isatty()))
