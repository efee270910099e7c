"""`finray runs` with its verbs, and `finray clean`."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ...training.common.errors import InputError, RunError, writing
from ...training.common.formatting import one_line
from ...training.common.progress import SILENT
from ...training.common.storage import Folder
from ...training.config.default_storage import default_storage
from ...training.config.paths import resolve_path
from ...training.records.notes import noted_runs
from ...training.records.run_folder import Record, read_recipe
from ..screens.runs import render_runs, terminal_width

if TYPE_CHECKING:
    from ...tuning.removal import Removal


def runs(options: argparse.Namespace) -> None:
    """List the runs of a storage."""
    storage = _storage(options)
    listed = noted_runs(storage)
    if not listed and not options.json:
        print(f"no runs in {storage} yet")
        return
    print(
        render_runs(
            listed,
            as_json=options.json,
            sort=options.sort,
            tag=options.tag,
            recipes=_recipes(
                storage / name
                for name, record in listed
                if options.sort in (record.get("metrics") or {})
            ),
            width=terminal_width(),
        )
    )
    for _, record in listed:
        if record.get("problem"):
            print(one_line(record["problem"]), file=sys.stderr)


def _recipes(runs: Iterable[Folder]) -> Iterator[Record]:
    """The recipes of runs; one that cannot be read is named on stderr."""
    for run in runs:
        try:
            yield read_recipe(run)[1]
        except InputError as error:
            print(one_line(str(error)), file=sys.stderr)


def compare(options: argparse.Namespace) -> None:
    """Show how runs differ, on the terminal or as a page."""
    from ...training.records.comparison import compare_runs
    from ..api.housekeeping import find_run
    from ..screens.comparison import render_comparison

    storage = _storage(options)
    comparison = compare_runs([find_run(run, storage) for run in options.runs])
    if options.json:
        print(json.dumps(comparison.as_json(), indent=2))
    elif options.page is not None:
        from ...training.records.comparison_page import render_page

        page = Path(resolve_path(str(options.page), Path.cwd()))
        text = render_page(comparison)
        with writing(f"--page {page}", "give another file"):
            Folder(str(page.parent)).write(page.name, text.encode("utf-8", "replace"))
        print(page)
    else:
        print(
            render_comparison(
                comparison, options.rows, colour=sys.stdout.isatty(), width=terminal_width()
            )
        )


def note(options: argparse.Namespace) -> None:
    """Write a note about a run."""
    from ..api.housekeeping import find_run, note_run

    if options.text is None and not options.tags and not options.without:
        raise InputError("runs note needs a TEXT, --tag or --untag")
    folder = find_run(options.run, _storage(options))
    written = note_run(folder, options.text, options.tags, options.without)
    tags = [f"#{tag}" for tag in written.tags]
    print(f"{folder.name}: {' '.join([one_line(written.text), *tags]).strip()}")


def rm(options: argparse.Namespace) -> None:
    """Delete runs that are named."""
    from ..api.housekeeping import plan_rm

    removal = plan_rm(options.runs, _storage(options), options.unfinished)
    if removal.kept:
        kept = "\n".join(f"  {name}: {why}" for name, why in removal.kept)
        raise InputError(f"nothing is deleted, because these runs are kept:\n{kept}")
    _carry_out(removal, options)


def prune(options: argparse.Namespace) -> None:
    """Delete runs by a rule."""
    from ..api.housekeeping import plan_prune

    removal = plan_prune(
        _storage(options),
        keep_best=options.keep_best,
        by=options.by,
        older_than=options.older_than,
        unfinished=options.unfinished,
    )
    _carry_out(removal, options)


def clean(options: argparse.Namespace) -> None:
    """Delete what no run refers to."""
    from ..api.housekeeping import plan_clean

    _carry_out(plan_clean(_storage(options), options.older_than), options)


def _carry_out(removal: "Removal", options: argparse.Namespace) -> None:
    """Show the plan; delete with --yes, or after a question on a terminal."""
    from ...tuning.removal import remove
    from ..screens.progress import ProgressWatcher
    from ..screens.removal import is_confirmed, render_deleted, render_removal

    if not options.json:
        print(render_removal(removal))
    if not removal.doomed or not (options.yes or (not options.json and is_confirmed())):
        if options.json:
            print(json.dumps(removal.as_json([]), indent=2))
        elif removal.doomed:
            print("nothing is deleted yet; add --yes")
        return
    with nullcontext(SILENT) if options.quiet else ProgressWatcher() as progress:
        deleted, left = remove(removal, progress)
    if options.json:
        print(json.dumps(removal.as_json(deleted), indent=2))
    else:
        print(render_deleted(deleted, removal))
    if left:
        raise RunError("\n".join(left))


def _storage(options: argparse.Namespace) -> Folder:
    return Folder(resolve_path(options.storage or default_storage(), Path.cwd()))
