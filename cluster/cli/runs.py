"""Small commands: `finray report`, `export` and `schema`."""

import argparse
import json
from pathlib import Path

from ...training.common.errors import InputError, writing
from ...training.common.storage import Folder
from ...training.config.default_storage import default_storage
from ...training.config.paths import resolve_path
from ...training.config.recipe import Recipe
from ...training.config.section import json_schema
from ...training.records.report import write_report
from ...training.records.run_folder import REPORT_FILE
from ...tuning.sweep import Sweep
from ..api.housekeeping import find_run
from ..api.runs import export as write_export


def report(options: argparse.Namespace) -> None:
    """Write a run's report again."""
    storage = Folder(resolve_path(default_storage(), Path.cwd()))
    folder = find_run(options.run, storage)
    with writing(folder / REPORT_FILE, "make the folder writable"):
        write_report(folder)
    print(folder / REPORT_FILE)


def export(options: argparse.Namespace) -> None:
    """Write a finished run's result as a folder that loads without finray."""
    # It loads torch, which the other commands here do without.
    from ..screens.export import render_exported

    if options.to is None and options.push is None:
        raise InputError("export needs --to or --push; see finray export --help")
    exported = write_export(
        options.run,
        options.to,
        merge=options.merge,
        dtype=options.dtype,
        quantize=options.quantize,
        format=options.format,
        llama_cpp=options.llama_cpp,
        ollama=options.ollama,
        push=options.push,
        public=options.public,
        quiet=options.quiet,
    )
    waits = options.format == "gguf" and options.llama_cpp is None
    print(render_exported(exported, as_json=options.json, to_convert=waits))


def schema(options: argparse.Namespace) -> None:
    """Print the JSON schema of recipes or sweeps."""
    settings = Sweep if options.of == "sweep" else Recipe
    print(json.dumps(json_schema(settings), indent=2))
