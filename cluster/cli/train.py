"""`finray train`: train, or continue an unfinished run."""

import argparse
import json
import sys

from ...training.common.stop import Stop
from ...training.data.inspection import inspect_data
from ...training.run import Listener, run_folder
from ...training.run import train as run_to_the_end
from ..launcher import placed
from .check import recipe_of
from .screens.progress import ProgressWatcher
from .screens.summary import render_summary


def train(options: argparse.Namespace) -> None:
    """Train, or continue an unfinished run."""
    recipe = recipe_of(options)
    inspect_data(recipe)
    stop = Stop()
    with placed(recipe, options, stop) as launch, ProgressWatcher() as watcher:
        record = run_to_the_end(recipe, Listener(watcher.phase, watcher.watch), stop, launch)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        print(render_summary(run_folder(recipe), colour=sys.stdout.isatty()))
