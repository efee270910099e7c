"""`finray tune`: run a sweep, continue an unfinished one, or show one."""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...training.common.errors import InputError
from ...training.common.storage import Folder
from ...training.config.paths import resolve_path
from ...tuning.sweep_folder import existing_sweep
from ..api.sweeps import read_sweep_source
from ..api.sweeps import tune as run_to_the_end
from ..screens.sweep import render_sweep

_UPDATE_SECONDS = 1.0


def tune(options: argparse.Namespace) -> None:
    """Search for good settings, continue an unfinished sweep, or show one."""
    words = options.sweep
    if words[0] == "show" and len(words) == 2:
        show_sweep(words[1], options)
    elif len(words) == 1:
        run_sweep(words[0], options)
    else:
        raise InputError(f"tune {' '.join(words)}: expected SWEEP, or show and SWEEP or its folder")


def run_sweep(path: str, options: argparse.Namespace) -> None:
    """Search, or continue an unfinished sweep."""
    sweep = run_to_the_end(
        path,
        options.overrides,
        stop_when=options.bounds,
        local=options.local,
        address=options.address,
        wait_for_nodes=options.wait_for_nodes,
        verbose=options.verbose,
        quiet=options.quiet,
    )
    print(json.dumps(sweep.record, indent=2) if options.json else sweep)


def show_sweep(name: str, options: argparse.Namespace) -> None:
    """Print a sweep's table; on a terminal, update it while the sweep runs."""
    path = Path(name)
    if path.is_file():
        loaded = read_sweep_source(path, options.overrides, options.bounds, local=options.local)
        sweep = loaded.sweep
        folder = Folder(sweep.storage) / sweep.name
    else:
        folder = Folder(resolve_path(name, Path.cwd()))
    record = existing_sweep(folder)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    console = Console()
    if not console.is_terminal or record["status"] != "running":
        print(render_sweep(record, folder))
        return
    with Live(console=console, auto_refresh=False) as live:
        while record["status"] == "running":
            live.update(Text(render_sweep(record, folder)), refresh=True)
            time.sleep(_UPDATE_SECONDS)
            record = existing_sweep(folder)
        live.update(Text(render_sweep(record, folder)), refresh=True)
