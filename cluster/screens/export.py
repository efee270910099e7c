"""The progress bar of `finray export`, and its result."""

import json

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from ...training.export.export import ExportSummary
from ...training.export.gguf import shown_command
from .counting import BarProgress

KINDS = {
    "adapter": "the adapter alone",
    "merged": "the adapter merged into its base",
    "model": "the trained model",
}


class ExportProgress(BarProgress):
    """A bar of bytes while the block runs, if stderr is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        super().__init__(*columns, what="", console=console, visible=False)

    def advance(self, done: int, total: int) -> None:
        """Bytes of weights written so far, and in all."""
        self._bars.update(self._bar, completed=done, total=total, visible=True)


def render_exported(exported: ExportSummary, as_json: bool, to_convert: bool = False) -> str:
    """The exported files, how to load them, and where they were uploaded.

    Args:
        exported: what was exported.
        as_json: print it as JSON.
        to_convert: add the command that converts it to GGUF.
    """
    result = exported.result
    if as_json:
        values = {
            "folder": str(exported.folder),
            "kind": result.kind,
            "base": result.base,
            "files": exported.files,
            "bytes": exported.bytes,
            **({} if exported.pushed is None else {"pushed": exported.pushed}),
        }
        return json.dumps(values, indent=2)
    size = f"{exported.files} files, {decimal(exported.bytes)}"
    lines = [f"{exported.folder}: {KINDS[result.kind]} ({size})", ""]
    lines += [f"  {line}" for line in result.loading_lines(exported.folder)]
    if exported.pushed is not None:
        lines += ["", f"  {exported.pushed}"]
    if to_convert:
        file = exported.folder / f"{exported.folder.name}.gguf"
        lines += ["", "In a checkout of llama.cpp, LLAMA_CPP, this writes the GGUF file:"]
        lines.append(f"  {shown_command(exported.folder, file)}")
    return "\n".join(lines)
