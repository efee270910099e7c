"""The progress bar of `finray export`, and its result."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ....training.export.export import Exported

KINDS = {
    "adapter": "the adapter alone",
    "merged": "the adapter merged into its base",
    "model": "the trained model",
}


@contextmanager
def export_progress(console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes while the block runs, if stderr is a terminal."""
    console = console or Console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield progress


def render_exported(exported: Exported, as_json: bool) -> str:
    """The exported files, and how to load them."""
    result = exported.result
    if as_json:
        values = {
            "folder": str(exported.folder),
            "kind": result.kind,
            "base": result.base,
            "files": exported.files,
            "bytes": exported.bytes,
        }
        return json.dumps(values, indent=2)
    size = f"{exported.files} files, {decimal(exported.bytes)}"
    lines = [f"{exported.folder}: {KINDS[result.kind]} ({size})", ""]
    lines += [f"  {line}" for line in result.two_lines(exported.folder)]
    return "\n".join(lines)
